"""Residual two-layer memories M(z) = z + U s(V z) that share keys, written chunk by chunk.

A group holds n memories per head that see the same keys, values and gates, so that their first
layers are one tall matrix: its Gram matrix and its triangular solve are done once for all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.delta_rule import delta_chunk


class FastWeights(NamedTuple):
    """The fast weights of a group of memories for one sequence, in at least float32.

    Attributes:
      inner: V, [H, n, f, d].
      outer: U, [H, n, d, f].
      inner_momentum: S of V, or None without momentum.
      outer_momentum: S of U, or None without momentum.
    """

    inner: Float[Array, "H n f d"]
    outer: Float[Array, "H n d f"]
    inner_momentum: Float[Array, "H n f d"] | None
    outer_momentum: Float[Array, "H n d f"] | None


class Written(NamedTuple):
    """One chunk's context for a group, heads first: keys, values [H, C, d], gates [H, C]."""

    keys: Float[Array, "H C d"]
    values: Float[Array, "H C d"]
    rate: Float[Array, "H C"]
    keep: Float[Array, "H C"]
    momentum: Float[Array, "H C"] | None


class Rule(NamedTuple):
    """Which update a chunk makes; see `SelfModifyingConfig` for the meaning of each field."""

    objective: str
    values: str
    dgd: str
    erase: str
    inner_clip: float | None
    read: str


def activation(z):
    """GELU (the paper leaves sigma open); the tanh form, whose slope is cheap."""
    return jax.nn.gelu(z, approximate=True)


def hidden(inner: Float[Array, "H n f d"], z: Float[Array, "H C d"]) -> Float[Array, "H n C f"]:
    """V z for every memory of the group."""
    return jnp.einsum("hnfd,hcd->hncf", inner, z)


def predict(weights: FastWeights, z: Float[Array, "H C d"]) -> Float[Array, "H n C d"]:
    """M(z) = z + U s(V z) for every memory of the group (paper eq. 89)."""
    return z[:, None] + _outer(weights.outer, activation(hidden(weights.inner, z)))


def _outer(outer, h):
    return jnp.einsum("hndf,hncf->hncd", outer, h)


def write_chunk(
    weights: FastWeights, chunk: Written, rule: Rule, queries: Float[Array, "H C d"] | None = None
) -> tuple[FastWeights, Float[Array, "H n C d"] | None]:
    """Write one chunk into every memory of the group and read the queries on the way.

    The inner gradient of `1/2 ||M(k) - vhat||^2` (or `-<M(k), vhat>`) is taken at the weights of
    the chunk's start with `vhat = M(v)` constant in it (spec C6.5); the outer loss differentiates
    through everything. Both matrices then follow the delta rule with their own layer input.

    Returns:
      The fast weights after the chunk and the reads, [H, n, C, d] (None without queries).
    """
    before = hidden(weights.inner, chunk.keys)
    h, slope = jax.jvp(activation, (before,), (jnp.ones_like(before),))
    error = _output_error(weights, chunk, rule, h)
    if rule.inner_clip is not None:
        norm = jnp.sqrt(jnp.sum(error**2, axis=-1, keepdims=True) + 1e-12)
        error = error * jnp.minimum(1.0, rule.inner_clip / norm)
    inner_error = jnp.einsum("hndf,hncd->hncf", weights.outer, error) * slope
    inner_queries = outer_queries = reads = None
    if queries is not None and rule.read == "anchor":
        reads = predict(weights, queries)
    elif queries is not None:
        inner_queries = queries
    heads, n, f, d = weights.inner.shape
    squared = jnp.sum(chunk.keys**2, axis=-1)
    stacked = delta_chunk(
        chunk.keys,
        jnp.moveaxis(inner_error, 1, 2).reshape(heads, -1, n * f),
        chunk.rate,
        keep=chunk.keep,
        erase=_erase(rule, "inner", chunk.rate, squared),
        momentum=chunk.momentum,
        initial=weights.inner.reshape(heads, n * f, d),
        initial_momentum=_flat(weights.inner_momentum, (heads, n * f, d)),
        queries=inner_queries,
        read=rule.read,
    )
    if stacked.reads is not None:
        seen = stacked.reads.reshape(heads, -1, n, f)
        outer_queries = activation(jnp.moveaxis(seen, 2, 1))
    rate, keep = chunk.rate[:, None], chunk.keep[:, None]
    outer = delta_chunk(
        h,
        error,
        rate,
        keep=keep,
        erase=_erase(rule, "outer", rate, jnp.sum(h**2, axis=-1)),
        momentum=None if chunk.momentum is None else chunk.momentum[:, None],
        initial=weights.outer,
        initial_momentum=weights.outer_momentum,
        queries=outer_queries,
        read=rule.read,
    )
    if queries is not None and outer.reads is not None:
        reads = queries[:, None] + outer.reads
    inner_shape = weights.inner.shape
    return (
        FastWeights(
            stacked.final.reshape(inner_shape),
            outer.final,
            _flat(stacked.final_momentum, inner_shape),
            outer.final_momentum,
        ),
        reads,
    )


def _flat(array, shape):
    return None if array is None else array.reshape(shape)


def _output_error(weights, chunk, rule, h):
    """dl/dM(k) at the anchor, [H, n, C, d]."""
    keys, values = chunk.keys[:, None], chunk.values[:, None]
    value_hidden = None
    if rule.values == "self":
        value_hidden = activation(hidden(weights.inner, chunk.values))
    if rule.objective == "dot":
        target = values if value_hidden is None else values + _outer(weights.outer, value_hidden)
        error = jnp.broadcast_to(-target, (*h.shape[:-1], values.shape[-1]))
    else:
        difference = h if value_hidden is None else h - value_hidden
        error = keys - values + _outer(weights.outer, difference)
    if rule.dgd == "functional":  # R4: the gradient of 1/2 ||U s(V k)||^2 in place of the erasure
        error = error + _outer(weights.outer, h)
    return error


def _erase(rule, layer, rate, squared_norm):
    """beta of spec C6.5: the erasure along a layer's input, kept non-expansive."""
    if rule.dgd == "layerwise" or (rule.dgd == "input_only" and layer == "inner"):
        if rule.erase == "implicit":
            return rate / (1.0 + rate * squared_norm)
        return jnp.broadcast_to(rate / jnp.maximum(1.0, rate * squared_norm), squared_norm.shape)
    return None
