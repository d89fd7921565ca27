"""The precision that memories are accumulated in."""

import jax.numpy as jnp


def accumulation_dtype(*arrays):
    """float64 if any of the arrays is, else float32: never less for a state, decay or solve.

    `jnp.promote_types` would do, but raises under `numpy_dtype_promotion=strict`.
    """
    wide = any(jnp.dtype(getattr(a, "dtype", a)) == jnp.float64 for a in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)
