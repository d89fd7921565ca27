"""Strict numerics and runtime shape checks for the whole suite."""

import os

import jax
import pytest
from jaxtyping import install_import_hook

# Compiling is most of the suite's time and its arrays are tiny: it takes a third as long without
# LLVM's passes, without splitting a module for threads, and without the emitter of fused loops.
_FAST_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if jax.__version_info__ < (0, 11):  # newer ones have no other emitter, and end at a flag unknown
    _FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST_COMPILE}".strip()

# Commands in processes of their own leave nothing in the home of who runs the tests.
os.environ.setdefault("NESTEDJAX_CACHE", "off")

install_import_hook(["nestedjax", "pallas_kernels"], "beartype.beartype")

# `JAX_PLATFORMS=cuda,cpu pytest -m gpu` is for a machine with a GPU
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64():
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield
