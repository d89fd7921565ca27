"""Root-mean-square normalisation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nestedjax.layers.parameters import param, weight, weight_dtype


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last axis (eps 1e-6), with a learned scale.

    Args:
      shape: sizes of the trailing axes that the scale covers; only the last one is normalised.
      axes: their logical names.
      dtype: dtype of the result; the statistics are computed in at least float32.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[str], *, dtype: str):
        ones = jnp.ones(tuple(shape), weight_dtype(dtype))
        self.scale = param(ones, axes, matrix=None, weight_decay=False)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalise x [..., *shape]."""
        scale = weight(self.scale)
        wide = x.astype(scale.dtype)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - scale.ndim)))
        return (wide * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(self.dtype)
