"""One chunk of residual two-layer memories M(z) = z + U s(V z) that share keys.

A group holds n memories per head that see the same keys, values and gates, so that their first
layers are one tall matrix, whose Gram matrix and triangular inverse are computed once for all of
them. Tokens are columns ([features, C]): then every product below takes its matrices as they lie in
memory, and splitting the tall matrix into the memories moves nothing. Heads are the first axis.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import delta_rule
from pallas_kernels._linalg.derivatives import differentiable
from pallas_kernels._linalg.numerics import PLAIN, Form
from pallas_kernels._linalg.products import nn, tn
from pallas_kernels.delta_rule import Operands
from pallas_kernels.mlp_memory.types import FastWeights, Readout, Reads, Rule, Tokens, Written

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


# Written by hand so that only the slope is kept: what autodiff keeps would fill a kernel's memory.
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


def predict(weights: FastWeights, z: Float[Array, "H n d C"], form: Form = PLAIN) -> Reads:
    """M(z) = z + U s(V z) for every memory of the group (paper eq. 89)."""
    before = nn(weights.inner, z, form)
    return Reads(z, before, z + nn(weights.outer, activation(before), form))


def write_chunk(
    weights: FastWeights,
    chunk: Written,
    rule: Rule,
    reads: Reads | None = None,
    *,
    form: Form = PLAIN,
) -> tuple[FastWeights, Float[Array, "H d C"] | None]:
    """Write one chunk into every memory of the group, and read the last one on the way.

    The inner gradient of `1/2 ||M(k) - vhat||^2` (or `-<M(k), vhat>`) is taken at the weights of
    the chunk's start with `vhat = M(v)` constant in it (spec C6.5); the outer loss differentiates
    through everything. Both matrices then follow the delta rule with their own layer input.

    Args:
      weights: at the chunk's start, the anchor.
      chunk: what is written.
      rule: how.
      reads: `predict` of the group, whose last inputs are the queries; None reads nothing.
      form: see `Form`.

    Returns:
      The fast weights after the chunk and the reads, [H, d, C] (None without queries).
    """
    anchor = _at_anchor(weights, chunk, rule, form)
    heads, n, f, d = weights.inner.shape
    tall = (heads, n * f, d)
    # A token's gradient by a matrix is the outer product E x^T, whose norm is |E| |x|. The clip
    # therefore needs the two norms, and never the gradient itself.
    size, wide = jnp.sum(chunk.keys**2, axis=-2), jnp.sum(anchor.h**2, axis=-2)
    inner_error = tn(weights.outer, anchor.error, form) * anchor.slope
    inner_error = _clipped(inner_error, size[:, None], rule)
    eta, erase = chunk.learning_rate, _erase(rule, "inner", chunk.learning_rate, size)
    tables = delta_rule.chunk_tables(eta, chunk.decay, chunk.momentum, form)
    of_inner = Operands(
        x=chunk.keys,
        error=inner_error.reshape(heads, n * f, -1),
        learning_rate=eta,
        erase=erase,
        initial=weights.inner.reshape(tall),
        initial_momentum=_shaped(weights.inner_momentum, tall),
        anchored=anchor.before.reshape(heads, n * f, -1),
    )
    eta = eta[:, None]
    of_outer = Operands(
        x=anchor.h,
        error=_clipped(anchor.error, wide, rule),
        learning_rate=eta,
        erase=_erase(rule, "outer", eta, wide),
        initial=weights.outer,
        initial_momentum=weights.outer_momentum,
        anchored=anchor.out,
    )
    outer_tables = jax.tree.map(lambda table: table[:, None], tables)
    # The inverse of V is not named for the checkpoint policy: it is one small matrix for all
    # memories, cheaper to compute again than to store. U has one for each memory.
    both = [(of_inner, tables, False), (of_outer, outer_tables, not form.dense)]
    inner, outer = delta_rule.solve_chunks(both, form)
    read = None if reads is None else _read_last(inner, outer, reads, f, rule.read)
    (inner_end, inner_momentum), (outer_end, outer_momentum) = map(
        delta_rule.write_chunk, (inner, outer)
    )
    inner_end = inner_end.reshape(weights.inner.shape)
    inner_momentum = _shaped(inner_momentum, weights.inner.shape)
    return FastWeights(inner_end, outer_end, inner_momentum, outer_momentum), read


def _read_last(inner, outer, reads: Reads, f: int, read: str) -> Float[Array, "H d C"]:
    """Read the last memory of a group whose chunk is solved: V by the queries, then U by s(V q)."""
    if read == "anchor":
        return reads.out[:, -1]
    rows = ("initial", "initial_momentum", "written", "erased")
    last = {name: getattr(inner, name) for name in rows}
    last = {name: None if a is None else a[:, -f:] for name, a in last.items()}
    queries, before = reads.inputs[:, -1], reads.before[:, -1]
    seen = delta_rule.read_chunk(inner._replace(**last), queries, read=read, anchored=before)
    last = {name: getattr(outer, name) for name in (*rows, "x")}
    last = {name: None if a is None else a[:, -1] for name, a in last.items()}
    tables = jax.tree.map(lambda table: table[:, 0], outer.tables)
    outer = outer._replace(tables=tables, **last)
    return queries + delta_rule.read_chunk(outer, activation(seen), read=read)


class _Anchor(NamedTuple):
    """A chunk's keys passed through the memories as of its start, each [H, n, features, C].

    Attributes:
      before: V k.
      h: s(V k).
      slope: s'(V k).
      out: U s(V k).
      error: dl/dM(k), clipped.
    """

    before: Float[Array, "H n f C"]
    h: Float[Array, "H n f C"]
    slope: Float[Array, "H n f C"]
    out: Float[Array, "H n d C"]
    error: Float[Array, "H n d C"]


def _at_anchor(weights: FastWeights, chunk: Written, rule: Rule, form: Form) -> _Anchor:
    """Pass the keys, and with "self" the values, through the memories: one product a matrix."""
    keys, values = chunk.keys[:, None], chunk.values[:, None]
    if rule.values == "self":
        both = jnp.concatenate([chunk.keys, chunk.values], axis=-1)
        both = _tall(weights.inner, both, form)
        before, value_before = jnp.split(both, 2, axis=-1)
        h, slope = activation_and_slope(before)
        out = nn(weights.outer, jnp.concatenate([h, activation(value_before)], axis=-1), form)
        out, value_out = jnp.split(out, 2, axis=-1)
        target = values + value_out
    else:
        before = _tall(weights.inner, chunk.keys, form)
        h, slope = activation_and_slope(before)
        out, target = nn(weights.outer, h, form), values
    if rule.objective == "dot":
        error = jnp.broadcast_to(-target, out.shape)
    else:
        error = keys + out - target
    if rule.dgd == "functional":  # R4: the gradient of 1/2 ||U s(V k)||^2 in place of the erasure
        error = error + out
    return _Anchor(before, h, slope, out, _clipped(error, 1.0, rule))


def _clipped(error, squared_norm, rule: Rule):
    """`error`, scaled so that its norm times that of the layer's input is at most `inner_clip`."""
    if rule.inner_clip is None:
        return error
    norm = jnp.sqrt(jnp.sum(error**2, axis=-2) * squared_norm + 1e-12)
    return error * jnp.minimum(1.0, rule.inner_clip / norm)[..., None, :]


def _tall(inner, columns, form: Form):
    """V z of shared inputs [H, d, C] for every memory of the group, as one tall matrix."""
    heads, n, f, d = inner.shape
    return nn(inner.reshape(heads, n * f, d), columns, form).reshape(heads, n, f, -1)


def _shaped(array, shape):
    return None if array is None else array.reshape(shape)


def _erase(rule, layer, eta, squared_norm):
    """beta of spec C6.5: how strongly a layer's input is erased, never so that the memory grows."""
    if rule.dgd == "layerwise" or (rule.dgd == "input_only" and layer == "inner"):
        if rule.erase == "implicit":
            return eta / (1.0 + eta * squared_norm)
        return jnp.broadcast_to(eta / jnp.maximum(1.0, eta * squared_norm), squared_norm.shape)
    return None


def unit(x):
    """Columns of norm one."""
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-2, keepdims=True) + 1e-6)


def _gate(weights, bias, out):
    """A scalar per token from what a memory says, [H, d, C]: sigmoid(w . M(x) + b)."""
    said = jnp.sum(weights[..., None] * out, axis=-2)
    return jax.nn.sigmoid(said + bias[..., None])


def generate(
    weights: FastWeights,
    x: Tokens,
    readout: Readout,
    rule: Rule,
    *,
    queried: bool,
    form: Form = PLAIN,
) -> tuple[Float[Array, "H d C"] | None, Written, Reads]:
    """A chunk's context from the memories at its start (paper eq. 79-85): queries, context, reads.

    The memories of the group are key, learning rate, decay, value, then the one of adaptive
    queries, then the queried one; `queried` says whether the last one belongs to the group.
    """
    inputs, queries = [x.keys, x.keys, x.keys, x.values], x.queries
    if queries is not None and not rule.adaptive_query:
        queries = unit(queries)
    if rule.adaptive_query or queried:
        assert queries is not None
        inputs.append(queries)
    own = jax.tree.map(lambda a: a[:, : len(inputs)], weights)
    reads = predict(own, jnp.stack(inputs, axis=1), form)
    key, eta, decay, value = (reads.out[:, i] for i in range(4))
    if rule.adaptive_query:
        queries = unit(reads.out[:, 4])
        last = jax.tree.map(lambda a: a[:, -1:], weights)
        reads = predict(last, queries[:, None], form)
    eta = rule.max_learning_rate * _gate(readout.learning_rate, readout.learning_rate_bias, eta)
    decay = _gate(readout.decay, readout.decay_bias, decay)
    return queries, Written(unit(key), value, eta, decay, x.momentum), reads


def restarted(weights: FastWeights, begins, inner, outer) -> FastWeights:
    """`weights`, or where `begins` holds those at a document's start; it broadcasts to them."""
    at_start = (inner, outer, *(None if a is None else jnp.zeros_like(a) for a in weights[2:]))
    return jax.tree.map(
        lambda new, old: jnp.where(begins, new, old), FastWeights(*at_start), weights
    )


def memory_chunk(
    weights: FastWeights,
    tokens: Tokens,
    readout: Readout | None,
    rule: Rule,
    *,
    form: Form = PLAIN,
) -> tuple[FastWeights, Float[Array, "H d C"] | None]:
    """One chunk of all memories of a group: make its context, write it everywhere, read the last.

    Args:
      weights: at the chunk's start.
      tokens: of the chunk, one leading axis H.
      readout: how the memories make their context; None where `tokens` is the context.
      rule: see `Rule`.
      form: see `Form`.

    Returns:
      The fast weights after the chunk and the reads, [H, d, C] (None without queries).
    """
    reads: Reads | None
    if readout is not None:
        _, written, reads = generate(weights, tokens, readout, rule, queried=True, form=form)
        return write_chunk(weights, written, rule, reads, form=form)
    assert tokens.learning_rate is not None and tokens.decay is not None
    written = Written(
        tokens.keys, tokens.values, tokens.learning_rate, tokens.decay, tokens.momentum
    )
    reads = None
    if tokens.queries is not None:
        last = jax.tree.map(lambda a: a[:, -1:], weights)
        reads = predict(last, tokens.queries[:, None], form)
    return write_chunk(weights, written, rule, reads, form=form)
