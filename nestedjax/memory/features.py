"""Feature maps of keys and queries."""

from collections.abc import Callable
from math import factorial

import jax
import jax.numpy as jnp
from jax import Array

FeatureMap = Callable[[Array], Array]


def identity(x: Array) -> Array:
    """The vector as it is."""
    return x


def l2_normalise(x: Array) -> Array:
    """`x / sqrt(|x|^2 + 1e-12)` over the last axis (norm 1 to within an epsilon of 1e-6)."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def elu_plus_one(x: Array) -> Array:
    """`elu(x) + 1`, positive (linear attention)."""
    return jax.nn.elu(x) + 1.0


def polynomial(degree: int) -> FeatureMap:
    """All tensor powers `x^(i) / sqrt(i!)` up to the degree: `phi(q) . phi(k) -> exp(q . k)`.

    Args:
      degree: at least 0; the feature dimension is `sum_i d^i`.

    Returns:
      A feature map [..., d] -> [..., sum_i d^i].

    Raises:
      ValueError: degree < 0.
    """
    if degree < 0:
        raise ValueError(f"polynomial feature map: degree must be at least 0, got {degree}")

    def features(x: Array) -> Array:
        power = jnp.ones_like(x[..., :1])
        terms = [power]
        for i in range(1, degree + 1):
            power = (power[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
            terms.append(power / factorial(i) ** 0.5)
        return jnp.concatenate(terms, axis=-1)

    return features
