"""Strict numerics and runtime shape checks for the whole suite."""

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["nestedjax", "pallas_kernels"], "beartype.beartype")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64():
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield
