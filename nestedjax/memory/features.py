"""Feature maps of keys and queries."""

from collections.abc import Callable
from math import factorial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FeatureMap = Callable[[Float[Array, "*b d"]], Float[Array, "*b f"]]


def identity(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """The vector as it is."""
    return x


def l2_normalise(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """`x / sqrt(|x|^2 + 1e-12)` over the last axis: norm 1, and 0 with a finite derivative at 0."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def elu_plus_one(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """`elu(x) + 1`, which is positive (Katharopoulos et al., linear attention)."""
    return jax.nn.elu(x) + 1.0


def polynomial(degree: int) -> FeatureMap:
    """All tensor powers `x^(i) / sqrt(i!)` up to a degree.

    `phi(q) . phi(k)` is the Taylor series of `exp(q . k)` up to that degree.

    Args:
      degree: at least 0; the feature dimension is `sum_i d^i`.

    Returns:
      A feature map [..., d] -> [..., sum_i d^i].

    Raises:
      ValueError: degree < 0.
    """
    if degree < 0:
        raise ValueError(f"polynomial feature map: degree must be at least 0, got {degree}")

    def features(x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        power = jnp.ones_like(x[..., :1])
        terms = [power]
        for i in range(1, degree + 1):
            power = (power[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
            terms.append(power / factorial(i) ** 0.5)
        return jnp.concatenate(terms, axis=-1)

    return features
