"""Feature maps of keys and queries."""

from collections.abc import Callable
from math import factorial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax.errors import require_range

FeatureMap = Callable[[Float[Array, "*b d"]], Float[Array, "*b f"]]


def identity(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """The vector as it is."""
    return x


def extreme(size: Float[Array, "*b"], *, low: float = 1e-15) -> Float[Array, "*b"]:
    """What to divide by before numbers of this size are squared: 1 unless float32 has no square.

    The result is a constant to autodiff, for functions that do not depend on it.
    """
    size = jax.lax.stop_gradient(size)
    return jnp.where((size > 1e15) | ((size < low) & (size > 0)), size, jnp.ones_like(size))


def l2_normalise(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """`x / sqrt(|x|^2 + 1e-12)` over the last axis: norm 1, and 0 with a finite derivative at 0."""
    scale = extreme(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0), low=0.0)
    x = x / scale
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12 / scale / scale)


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
    require_range("polynomial: degree", degree, 0, integer=True)

    def features(x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        power = jnp.ones_like(x[..., :1])
        terms = [power]
        for i in range(1, degree + 1):
            power = (power[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
            terms.append(power / factorial(i) ** 0.5)
        return jnp.concatenate(terms, axis=-1)

    return features
