"""What every token of a chunk writes, from the weights at the chunk's start (spec C6.5).

A token's gradient by a matrix is the outer product E x^T of an error and the matrix's own input.
Tokens are columns ([features, C]), heads the first axis, memories of a group the second.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._linalg.derivatives import differentiable
from pallas_kernels._linalg.numerics import PLAIN, Form
from pallas_kernels._linalg.products import nn, tn
from pallas_kernels.mlp_memory.types import FastWeights, Reads, Rule, Written

FLOOR = 0.01  # of the squared norm that a normalised step divides by
_BEND, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu(z):
    """GELU in the tanh form, its slope and its curvature; what is unused is never computed."""
    squared = z * z
    bent = jnp.tanh(z * (_BEND + _BEND * _CUBIC * squared))
    inside = _BEND + 3.0 * _BEND * _CUBIC * squared
    share, steep = 0.5 + 0.5 * bent, 0.5 - 0.5 * bent * bent
    turn = steep * inside
    bending = 6.0 * _BEND * _CUBIC * z - 2.0 * bent * inside * inside  # of the slope of tanh
    curvature = 2.0 * turn + z * steep * bending
    return z * share, share + z * turn, curvature


def activation(z):
    """GELU, as the paper leaves sigma open; in the tanh form, whose slope is cheap."""
    return _activation(z)


def activation_and_slope(z):
    """GELU and its derivative from one tanh."""
    return _activation_and_slope(z)


def _activation_and_slope_forward(z):
    value, slope, curvature = _gelu(z)
    return (value, slope), (slope, curvature)


# Written by hand: what autodiff keeps would fill a kernel's memory.
_activation = differentiable(
    lambda z: _gelu(z)[0],
    lambda z: _gelu(z)[:2],
    lambda slope, tangents: tangents[0] * slope,
    lambda slope, g: (g * slope,),
)
_activation_and_slope = differentiable(
    lambda z: _gelu(z)[:2],
    _activation_and_slope_forward,
    lambda kept, tangents: (tangents[0] * kept[0], tangents[0] * kept[1]),
    lambda kept, g: (g[0] * kept[0] + g[1] * kept[1],),
)


class Writes(NamedTuple):
    """One matrix of every memory: W (decay I - erase x x^T) - learning_rate error x^T.

    Attributes:
      x: input of the matrix, [H, n, features, C]; n is 1 where all memories share it.
      error: [H, n, rows, C].
      learning_rate: [H, n or 1, C].
      erase: [H, n or 1, C], or None.
      anchored: W x at the chunk's start, [H, n, rows, C].
    """

    x: Float[Array, "H m f C"]
    error: Float[Array, "H n r C"]
    learning_rate: Float[Array, "H l C"]
    erase: Float[Array, "H e C"] | None
    anchored: Float[Array, "H n r C"]


def tall(weight, columns, form: Form = PLAIN):
    """W z of shared inputs [H, d, C] for every memory of the group, as one tall matrix."""
    heads, n, rows, d = weight.shape
    return nn(weight.reshape(heads, n * rows, d), columns, form).reshape(heads, n, rows, -1)


def predict(
    weights: FastWeights, z: Float[Array, "H n d C"], rule: Rule, form: Form = PLAIN
) -> Reads:
    """M(z) for every memory of the group: z + U s(V z) (paper eq. 89), or linear."""
    if weights.inner is None:
        out = nn(weights.outer, z, form)
        return Reads(z, None, z + out if rule.residual else out)
    before = nn(weights.inner, z, form)
    return Reads(z, before, z + nn(weights.outer, activation(before), form))


def unit(x):
    """Columns of norm one."""
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-2, keepdims=True) + 1e-6)


def writes(
    weights: FastWeights, chunk: Written, rule: Rule, form: Form = PLAIN
) -> tuple[Writes | None, Writes]:
    """What a chunk writes into V (None where nothing does) and into U of every memory."""
    if weights.inner is None:
        return None, _linear(weights, chunk, rule, form)
    keys, n = chunk.keys[:, None], weights.outer.shape[1]
    eta = chunk.learning_rate[:, None]
    if rule.values == "self":
        both = jnp.concatenate([chunk.keys, chunk.values], axis=-1)
        before, value_before = jnp.split(tall(weights.inner, both, form), 2, axis=-1)
        h, slope = activation_and_slope(before)
        out = nn(weights.outer, jnp.concatenate([h, activation(value_before)], axis=-1), form)
        out, value_out = jnp.split(out, 2, axis=-1)
        target = _target(chunk.values[:, None] + value_out, rule)
    else:
        before = tall(weights.inner, chunk.keys, form)
        h, slope = activation_and_slope(before)
        out, target = nn(weights.outer, h, form), chunk.values[:, None]
    # The norm of a gradient is |E| |x|: its clip needs the two norms, and never the gradient.
    wide = jnp.sum(h**2, axis=-2)
    error = _error(keys, out, target, rule)
    outer = Writes(
        h,
        _silenced(_outer_error(keys, error, target, wide, rule), rule, n),
        eta / (wide + FLOOR) if rule.step == "normalised" else eta,
        None,
        out,
    )
    outer = outer._replace(erase=_outer_erase(rule, outer.learning_rate, wide))
    if rule.written == "outer":
        return None, outer
    size = jnp.sum(chunk.keys**2, axis=-2)[:, None]
    inner_error = _clipped(tn(weights.outer, error, form) * slope, size, rule, "gradient")
    erase = None
    if rule.dgd in ("layerwise", "input_only"):
        erase = _erased(rule, eta, size)
    inner = Writes(keys, _silenced(inner_error, rule, n), eta, erase, before)
    return inner, outer


def _linear(weights: FastWeights, chunk: Written, rule: Rule, form: Form) -> Writes:
    """Linear memories, whose matrices share keys, and so one transition."""
    keys, values = chunk.keys[:, None], chunk.values[:, None]
    n, base = weights.outer.shape[1], keys if rule.residual else jnp.zeros_like(keys)
    if rule.values == "self":
        both = tall(weights.outer, jnp.concatenate([chunk.keys, chunk.values], axis=-1), form)
        out, value_out = jnp.split(both, 2, axis=-1)
        target = _target(values + value_out if rule.residual else value_out, rule)
    else:
        out = tall(weights.outer, chunk.keys, form)
        target = jnp.broadcast_to(values, out.shape)
    size = jnp.sum(keys**2, axis=-2)
    error = _error(base, out, target, rule)
    error = _silenced(_outer_error(base, error, target, size, rule), rule, n)
    eta = chunk.learning_rate[:, None]
    return Writes(keys, error, eta, _outer_erase(rule, eta, size), out)


def _target(target, rule: Rule):
    return unit(target) if rule.targets == "unit" else target


def _error(base, out, target, rule: Rule):
    """dl/dM(k) at the chunk's start, clipped; `base` is the residual's part of M(k)."""
    if rule.objective == "dot":
        error = jnp.broadcast_to(-target, out.shape)
    else:
        error = base + out - target
    if rule.dgd == "functional":  # R4: the gradient of 1/2 ||U s(V k)||^2 in place of the erasure
        error = error + out
    return _clipped(error, 1.0, rule, "error")


def _outer_error(base, error, target, squared_norm, rule: Rule):
    """What U writes: with "delta" its prediction is left to the erasure, which takes all of it."""
    if rule.objective == "delta":
        return base - target
    return _clipped(error, squared_norm, rule, "gradient")


def _outer_erase(rule: Rule, eta, squared_norm):
    if rule.objective == "delta":
        return eta
    return _erased(rule, eta, squared_norm) if rule.dgd in ("layerwise", "output_only") else None


def _erased(rule: Rule, eta, squared_norm):
    """beta of spec C6.5: how strongly a layer's input is erased, never so that the memory grows."""
    if rule.erase == "implicit":
        return eta / (1.0 + eta * squared_norm)
    return jnp.broadcast_to(eta / jnp.maximum(1.0, eta * squared_norm), squared_norm.shape)


def _clipped(error, squared_norm, rule: Rule, what: str):
    """`error`, scaled so that its norm times that of the layer's input is at most `inner_clip`."""
    if rule.inner_clip is None or rule.clip not in ("both", what):
        return error
    norm = jnp.sqrt(jnp.sum(error**2, axis=-2) * squared_norm + 1e-12)
    return error * jnp.minimum(1.0, rule.inner_clip / norm)[..., None, :]


def _silenced(error, rule: Rule, n: int):
    """Without the write terms of the memories that write nothing."""
    if not rule.silent:
        return error
    heard = jnp.array([float(i not in rule.silent) for i in range(n)], error.dtype)
    return error * heard[None, :, None, None]
