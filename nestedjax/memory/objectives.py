"""Objectives: what a memory minimises when it writes one token.

An objective is a loss of the memory's output and the value, and the output error `dl/dout` that is
propagated into the weights. With `r = M(k) - v` (spec C1, MIRAS table of objectives):

| function | loss | error |
|---|---|---|
| `dot` | `-<M(k), v>` | `-v` |
| `l2` | `factor/2 |r|^2` | `factor r` |
| `lp` | `1/p |r|_p^p` | `sign(r) |r|^(p-1)` |
| `smooth_lp` | as `lp` | `tanh(s r) (r^2 + eps)^((p-1)/2)` |
| `huber` | by coordinate | `clip(r, -d, d)` |
| `huber_norm` | by norm | `r min(1, d/|r|)` |
| `huber_mixture` | MIRAS-Yaad | `r` if `|r| <= d` else `d sign(r)` |
| `robust` | `1/2 |r|^2 + D |r|` | `r + D r/|r|` |
| `oja` | `-<Mk, v> + 1/2 |M^T v|^2` | `-v`, written on `k - M^T v` (linear memories) |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax.errors import require_range
from nestedjax.memory.features import extreme

Vectors = Float[Array, "*b dv"]  # outputs, values and errors
Numbers = Float[Array, "*b"]  # losses
Thresholds = Float[Array, "*b"] | None  # one for each token, or None


class Objective(NamedTuple):
    """What a memory minimises when it writes.

    Attributes:
      name: what tables and errors call it.
      loss: `loss(output[..., dv], value[..., dv], threshold[...]) -> [...]`; `threshold` is None
        for an objective without a data-dependent threshold.
      error: same arguments, `-> [..., dv]`, the derivative of the loss by the output (or the
        smooth stand-in that the source uses for it).
      penalty: optional `penalty(weight[dv, dk], value[dv]) -> []`, a loss on the weights of a
        linear memory themselves.
      deflate: optional `deflate(weight[dv, dk], key[..., dk], value[..., dv]) -> [..., dk]`: the
        gradient of loss plus penalty is `error deflate^T` in place of `error key^T`.
      token_threshold: whether `Tokens.threshold` has to be given.
      factor: of a squared error `factor/2 |r|^2`, for rules with a closed form; else None.
    """

    name: str
    loss: Callable[[Vectors, Vectors, Thresholds], Numbers]
    error: Callable[[Vectors, Vectors, Thresholds], Vectors]
    penalty: Callable[[Float[Array, "dv dk"], Float[Array, " dv"]], Float[Array, ""]] | None = None
    deflate: (
        Callable[[Float[Array, "dv dk"], Float[Array, "*b dk"], Vectors], Float[Array, "*b dk"]]
        | None
    ) = None
    token_threshold: bool = False
    factor: float | None = None


def _square(residual: Vectors) -> Numbers:
    return jnp.sum(residual * residual, axis=-1)


def _norm(residual: Vectors) -> Float[Array, "*b 1"]:
    """|r| over the last axis, with derivative 0 in place of nan at r = 0."""
    scale = extreme(jnp.max(jnp.abs(residual), axis=-1, keepdims=True, initial=0.0))
    square = jnp.sum((residual / scale) ** 2, axis=-1, keepdims=True)
    # The inner `where` keeps sqrt away from 0: its derivative there, times the 0 that the outer one
    # passes back, would be nan.
    positive = square > 0
    root = jnp.sqrt(jnp.where(positive, square, jnp.ones_like(square)))
    return jnp.where(positive, scale * root, 0.0)


def _unit(residual: Vectors) -> Vectors:
    residual = residual / extreme(jnp.max(jnp.abs(residual), axis=-1, keepdims=True, initial=0.0))
    norm = _norm(residual)
    return residual / jnp.where(norm > 0, norm, jnp.ones_like(norm))


def dot() -> Objective:
    """Dot-product objective `-<M(k), v>` (Hebbian; linear attention). Its error is `-v`."""
    return Objective(
        name="dot",
        loss=lambda output, value, threshold: -jnp.sum(output * value, axis=-1),
        error=lambda output, value, threshold: -value,
    )


def l2(factor: float = 1.0) -> Objective:
    """Regression `factor/2 |M(k) - v|^2`.

    Args:
      factor: 1 for the half objective of the equations, 2 for the unhalved one of the prose.

    Raises:
      ValueError: factor <= 0.
    """
    require_range("l2: factor", factor, 0, closed="neither")
    return Objective(
        name="l2",
        loss=lambda output, value, threshold: 0.5 * factor * _square(output - value),
        error=lambda output, value, threshold: factor * (output - value),
        factor=factor,
    )


def _lp_loss(p: float) -> Callable[[Vectors, Vectors, Thresholds], Numbers]:
    return lambda output, value, threshold: jnp.sum(jnp.abs(output - value) ** p, axis=-1) / p


def lp(p: float) -> Objective:
    """`1/p |M(k) - v|_p^p` with its exact gradient `sign(r) |r|^(p-1)`; p = 2 is `l2()`.

    Raises:
      ValueError: p < 1 (not convex). For 1 <= p < 2 the exact gradient is not differentiable at
        r = 0, where its derivative is taken as 0: take `smooth_lp` for a smooth outer gradient.
    """
    require_range("lp: p", p, 1)

    def error(output: Vectors, value: Vectors, threshold: Thresholds) -> Vectors:
        residual = output - value
        if p == 2:
            return residual
        size = jnp.abs(residual)
        positive = size > 0  # |r|^(p-2), a factor of the derivative, is infinite at 0 for p < 2
        power = jnp.where(positive, size, jnp.ones_like(size)) ** (p - 1)
        return jnp.where(positive, jnp.sign(residual) * power, 0.0)

    return Objective(name="lp", loss=_lp_loss(p), error=error)


def smooth_lp(p: float, *, sharpness: float = 10.0, epsilon: float = 1e-6) -> Objective:
    """`lp` with the smooth gradient of MIRAS: `tanh(sharpness r) (r^2 + epsilon)^((p-1)/2)`.

    The error is not the exact derivative of `loss`; it tends to it as the sharpness grows.

    Raises:
      ValueError: p < 1, or sharpness or epsilon <= 0.

    Reference: MIRAS (arXiv 2504.13173), Moneta; p = 3 there.
    """
    require_range("smooth_lp: p", p, 1)
    require_range("smooth_lp: sharpness", sharpness, 0, closed="neither")
    require_range("smooth_lp: epsilon", epsilon, 0, closed="neither")

    def error(output: Vectors, value: Vectors, threshold: Thresholds) -> Vectors:
        residual = output - value
        scale = extreme(jnp.abs(residual), low=0.0)
        square = (residual / scale) ** 2 + epsilon / scale / scale
        return jnp.tanh(sharpness * residual) * scale ** (p - 1) * square ** ((p - 1) / 2)

    return Objective(name="smooth_lp", loss=_lp_loss(p), error=error)


def _check_threshold(name: str, threshold: float | None) -> None:
    if threshold is not None:
        require_range(f"{name}: threshold", threshold, 0, closed="neither")


def _threshold(
    constant: float | None, token: Thresholds, like: Float[Array, "*b d"]
) -> Float[Array, "*b 1"]:
    """The threshold of each token, from the constant or from the token."""
    if constant is not None:
        return jnp.full((*like.shape[:-1], 1), constant, like.dtype)
    assert token is not None  # the product checks Tokens.threshold at its boundary
    return jnp.asarray(token, like.dtype)[..., None]


def huber(threshold: float | None = None) -> Objective:
    """Coordinate-wise Huber: quadratic up to the threshold, linear beyond; error `clip(r, -d, d)`.

    Args:
      threshold: d > 0; None takes each token's own from `Tokens.threshold`.

    Raises:
      ValueError: threshold <= 0.
    """
    _check_threshold("huber", threshold)

    def loss(output: Vectors, value: Vectors, token: Thresholds) -> Numbers:
        size = jnp.abs(output - value)
        d = _threshold(threshold, token, size)
        return jnp.sum(jnp.where(size <= d, 0.5 * size**2, d * (size - 0.5 * d)), axis=-1)

    def error(output: Vectors, value: Vectors, token: Thresholds) -> Vectors:
        residual = output - value
        d = _threshold(threshold, token, residual)
        return jnp.clip(residual, -d, d)

    return Objective("huber", loss, error, token_threshold=threshold is None)


def huber_norm(threshold: float | None = None) -> Objective:
    """Huber on the norm: error `r min(1, d/|r|)`, that is `l2` with its error clipped to norm d.

    With d = 1 this is the inner clip that keeps HOPE's memories stable (spec C6.12).

    Args:
      threshold: d > 0; None takes each token's own from `Tokens.threshold`.

    Raises:
      ValueError: threshold <= 0.
    """
    _check_threshold("huber_norm", threshold)

    def loss(output: Vectors, value: Vectors, token: Thresholds) -> Numbers:
        norm = _norm(output - value)
        d = _threshold(threshold, token, norm)
        return jnp.where(norm <= d, 0.5 * norm**2, d * (norm - 0.5 * d))[..., 0]

    def error(output: Vectors, value: Vectors, token: Thresholds) -> Vectors:
        residual = output - value
        norm = _norm(residual)
        d = _threshold(threshold, token, residual)
        inside = norm <= d
        return residual * jnp.where(inside, 1.0, d / jnp.where(inside, jnp.ones_like(norm), norm))

    return Objective("huber_norm", loss, error, token_threshold=threshold is None)


def huber_mixture(threshold: float | None = None) -> Objective:
    """Yaad's mixture as printed: error `r` where `|r| <= d`, else `d sign(r)`, with a jump between.

    Args:
      threshold: d > 0; None takes each token's own from `Tokens.threshold`.

    Raises:
      ValueError: threshold <= 0.

    Reference: MIRAS (arXiv 2504.13173), Yaad.
    """
    _check_threshold("huber_mixture", threshold)

    def loss(output: Vectors, value: Vectors, token: Thresholds) -> Numbers:
        residual = output - value
        d = _threshold(threshold, token, residual)[..., 0]
        outside = d * (jnp.sum(jnp.abs(residual), axis=-1) - 0.5 * d)
        return jnp.where(_norm(residual)[..., 0] <= d, 0.5 * _square(residual), outside)

    def error(output: Vectors, value: Vectors, token: Thresholds) -> Vectors:
        residual = output - value
        d = _threshold(threshold, token, residual)
        return jnp.where(_norm(residual) <= d, residual, d * jnp.sign(residual))

    return Objective("huber_mixture", loss, error, token_threshold=threshold is None)


def robust(radius: float) -> Objective:
    """Worst case of l2 over value shifts of norm `radius`: `1/2 |r|^2 + radius |r|`.

    Its error is `r + radius r/|r|` (0 at r = 0).

    Raises:
      ValueError: radius < 0.
    """
    require_range("robust: radius", radius, 0)

    def loss(output: Vectors, value: Vectors, threshold: Thresholds) -> Numbers:
        residual = output - value
        return 0.5 * _square(residual) + radius * _norm(residual)[..., 0]

    def error(output: Vectors, value: Vectors, threshold: Thresholds) -> Vectors:
        residual = output - value
        return residual + radius * _unit(residual)

    return Objective("robust", loss, error)


def oja() -> Objective:
    """Oja's rule `-<Mk, v> + 1/2 |M^T v|^2`, for linear memories only.

    Its gradient `-v k^T + v (M^T v)^T` has rank one: error `-v` on the deflated key `k - M^T v`.
    The printed equation misses the transpose (spec C1).
    """
    base = dot()
    return Objective(
        name="oja",
        loss=base.loss,
        error=base.error,
        penalty=lambda weight, value: 0.5 * _square(value @ weight),
        deflate=lambda weight, key, value: key - value @ weight,
    )
