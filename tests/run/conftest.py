"""Optax promotes dtypes implicitly; its callers run without the suite's strict promotion."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def standard_promotion():
    strict = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", strict)
