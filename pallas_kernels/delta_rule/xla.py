"""The delta rule chunk by chunk in plain jnp: matrix products and one triangular inverse (C6.8).

What token t erases depends on `R_t = W_{t-1} x_t`, what its key reads from the memory that all
tokens before it have written. In a chunk these form the unit-lower-triangular system

    R_t + sum_{i<t} Gam_{i,t-1} erase_i (x_i . x_t) R_i = B_t,

where B_t is what key t would read if nothing were erased in the chunk: a known sum over the states
at the chunk's start and the writes before t. Solved once, it gives every read and the final state
by products. Gam_{i,t}, The_{i,t} are the products of decay and of momentum over the tokens i+1..t;
kap_{i,t} = sum_{i<=s<=t} The_{i,s} Gam_{s,t} is what is left at t of a write that momentum has
spread over the tokens from i on.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._linalg.chunk_scan import chunk_scan
from pallas_kernels._linalg.derivatives import differentiable
from pallas_kernels._linalg.numerics import PLAIN, Form
from pallas_kernels._linalg.products import gram, nn, nt, scaled_nn, solve_unit_lowers, tn
from pallas_kernels._linalg.triangular import masked
from pallas_kernels.delta_rule.types import DeltaOutput, Operands


class Tables(NamedTuple):
    """Decay products of one chunk: row t, column i; tokens count from 1, and 0 is the anchor.

    Attributes:
      decay: Gam_{i,t} for i <= t, else 0; all ones below the diagonal without a decay gate.
      decay_before: Gam_{i,t-1} for i < t, else 0.
      write: kap_{i,t}, how much of write i is left at t; equal to `decay` without momentum.
      write_before: kap_{i,t-1}.
      decay_start: Gam_{0,t}, or None when it is one.
      momentum_start: The_{0,t}, or None without momentum.
      momentum_end: The_{i,C}, or None without momentum.
      carried: c_t, how much of the initial momentum has reached the memory, or None.
    """

    decay: Float[Array, "*a C C"]
    decay_before: Float[Array, "*a C C"]
    write: Float[Array, "*b C C"]
    write_before: Float[Array, "*b C C"]
    decay_start: Float[Array, "*c C"] | None
    momentum_start: Float[Array, "*d C"] | None
    momentum_end: Float[Array, "*d C"] | None
    carried: Float[Array, "*b C"] | None


def _logs(gate):
    # log 0 would give inf - inf; the smallest normal number keeps every difference finite. A
    # negative gate is outside of its range, and gives nan.
    tiny = jnp.finfo(gate.dtype).tiny
    return jnp.log(jnp.where(jnp.abs(gate) < tiny, tiny, gate))


def _turned(row):
    """A row [..., 1, C] as a column by masked sums: a TPU kernel cannot transpose a row."""
    square = jnp.broadcast_to(row, (*row.shape[:-2], row.shape[-1], row.shape[-1]))
    return jnp.sum(masked(square, lambda i, j: i == j), axis=-1, keepdims=True)


def _log_sums(gate, form: Form):
    """Running sums of the logs, as a row [..., 1, C] and as a column."""
    row = _logs(gate)[..., None, :]
    square = (*gate.shape, gate.shape[-1])
    if form.dense:
        column = jnp.broadcast_to(_turned(row), square)
        row_of_sums = jnp.sum(masked(column, lambda i, j: i <= j), axis=-2, keepdims=True)
        row = masked(jnp.broadcast_to(row, square), lambda i, j: i >= j)
        return row_of_sums, jnp.sum(row, axis=-1, keepdims=True)
    # A running sum as a product: on a CPU `cumsum` becomes a window over all tokens, C^2 steps too,
    # but without the speed of a product. In the highest precision, since exp magnifies its error.
    earlier = masked(jnp.ones((gate.shape[-1],) * 2, gate.dtype), lambda i, j: i <= j)
    sums = jnp.matmul(row[..., 0, :], earlier, precision="highest")
    return sums[..., None, :], sums[..., :, None]


def _products(row, column):
    """exp(s_t - s_i) for i <= t, else 0; masked before exp, so that nothing overflows."""
    return jnp.exp(masked(column - row, lambda i, j: i >= j, other=-jnp.inf))


def _made(gate, form: Form):
    """The products of a gate over all stretches of the chunk, and over those from its start."""
    row, column = _log_sums(gate, form)
    return _products(row, column), jnp.exp(row[..., 0, :])


def _made_and_kept(gate, form: Form):
    return (made := _made(gate, form)), made


def _stretches(table, start):
    """[..., t, C + 1]: the products up to the token before t, and as last column from the start."""
    first = _before(start, axis=start.ndim - 1, first=1.0)
    return jnp.concatenate([_before(table, axis=table.ndim - 2), first[..., None]], axis=-1)


def _made_tangent(form, kept, tangents):
    table, start = kept
    moved = nn(table, tangents[0][..., :, None] * _stretches(table, start), form)
    return moved[..., :-1], moved[..., -1]


def _made_transpose(form, kept, cotangents):
    # A product over a stretch, by one of its gates, is the product before the gate times that after
    # it. Through the logarithms it would be divided by the gate, which magnifies rounding errors.
    table, start = kept
    of_table, of_start = cotangents
    after = tn(table, jnp.concatenate([of_table, of_start[..., None]], axis=-1), form)
    return (jnp.sum(after * _stretches(table, start), axis=-1),)


_exact = differentiable(_made, _made_and_kept, _made_tangent, _made_transpose, static=1)


def _gate_products(gate, form: Form):
    # A kernel has no room for one more product of C^3, and differentiates the logarithms.
    return _made(gate, form) if form.dense else _exact(gate, form)


def _before(table, *, axis: int, first: float = 0.0):
    """The table one token earlier: row t becomes row t - 1, row 1 becomes `first`."""
    ahead = jax.lax.full_like(jax.lax.slice_in_dim(table, 0, 1, axis=axis), first)
    rest = jax.lax.slice_in_dim(table, 0, table.shape[axis] - 1, axis=axis)
    return jnp.concatenate([ahead, rest], axis=axis)


def chunk_tables(learning_rate, decay, momentum, form: Form = PLAIN) -> Tables:
    """The decay products of one chunk; memories that share gates share them.

    Args:
      learning_rate: [..., T]; gives dtype, length and leading dimensions.
      decay: [..., T], or None for a memory that forgets nothing.
      momentum: [..., T], or None.
      form: see `Form`.
    """
    if decay is None:
        ones = jnp.ones(
            (1,) * (learning_rate.ndim - 1) + (learning_rate.shape[-1],) * 2, learning_rate.dtype
        )
        products = masked(ones, lambda i, j: i >= j)
        decay_start = None
    else:
        products, decay_start = _gate_products(decay, form)
    before = _before(products, axis=products.ndim - 2)
    if momentum is None:
        return Tables(products, before, products, before, decay_start, None, None, None)
    velocity, momentum_start = _gate_products(momentum, form)
    # kap = Gam The as matrices [t, i]: every path of write i through the momentum (The_{i,s}) into
    # the memory at token s, and from there on through its decay (Gam_{s,t})
    write = nn(products, velocity, form)
    return Tables(
        products,
        before,
        write,
        _before(write, axis=write.ndim - 2),
        decay_start,
        momentum_start,
        velocity[..., -1, :],
        nt(momentum_start[..., None, :], products, form)[..., 0, :],
    )


class Solved(NamedTuple):
    """A solved chunk: what its reads and its final state are computed from.

    Attributes:
      tables: decay products.
      x: [..., n, C].
      initial: W_0, [..., m, n].
      initial_momentum: S_0, [..., m, n], or None.
      written: learning_rate_i error_i, [..., m, C]; with what is erased where both are one unknown.
      erased: erase_i W_{i-1} x_i, [..., m, C], or None without erasure and where `written` has it.
      form: see `Form`.
    """

    tables: Tables
    x: Float[Array, "*a n C"]
    initial: Float[Array, "*b m n"]
    initial_momentum: Float[Array, "*b m n"] | None
    written: Float[Array, "*c m C"]
    erased: Float[Array, "*d m C"] | None
    form: Form = PLAIN


def _from_start(rows, anchored, solved: Solved, *, before: bool):
    """What memory and momentum at the chunk's start add to W_t @ rows_t (to W_{t-1} if before)."""
    tables = solved.tables
    scale = tables.decay_start
    if scale is not None and before:
        scale = _before(scale, axis=scale.ndim - 1, first=1.0)
    if anchored is not None:
        out = anchored if scale is None else scale[..., None, :] * anchored
    elif scale is None:
        out = nn(solved.initial, rows, solved.form)
    else:
        out = scaled_nn(solved.initial, rows, scale, solved.form)
    if tables.carried is not None and solved.initial_momentum is not None:
        scale = tables.carried
        scale = _before(scale, axis=scale.ndim - 1) if before else scale
        out = out + scaled_nn(solved.initial_momentum, rows, scale, solved.form)
    return out


def solve_chunk(
    operands: Operands, tables: Tables, *, named: bool = True, form: Form = PLAIN
) -> Solved:
    """Find what every token of a chunk erases, by one unit-lower-triangular inverse (spec C6.8).

    Tokens are the last axis, so that no product needs a transpose, and so that memories which share
    keys stack along the rows of one tall matrix with a single inverse. `named`: see
    `solve_unit_lower`; `form`: see `Form`.
    """
    return solve_chunks([(operands, tables, named)], form)[0]


def solve_chunks(given: list[tuple[Operands, Tables, bool]], form: Form = PLAIN) -> list[Solved]:
    """`solve_chunk` of several memories, whose matrices a kernel inverts side by side.

    Args:
      given: for each its operands, decay products, and whether policies save the inverse.
      form: see `Form`.
    """
    starts, systems = [], []
    for operands, tables, _ in given:
        x, written = operands.x, operands.learning_rate[..., None, :] * operands.error
        start = Solved(tables, x, operands.initial, operands.initial_momentum, written, None, form)
        starts.append(start)
        if operands.erase is None:
            continue
        overlap = gram(x, form)
        right = _from_start(x, operands.anchored, start, before=True)
        if _as_one(tables, form):
            # What is written and what is erased decay alike: their sum solves a system of its own,
            # whose right side is no product.
            right = written + operands.erase[..., None, :] * right
            systems.append((tables.decay_before * overlap * operands.erase[..., :, None], right))
            continue
        # `right` is B. The solution's row i is R_i; times erase_i it is what token i erases.
        right = right - nt(written, tables.write_before * overlap, form)
        systems.append((tables.decay_before * overlap * operands.erase[..., None, :], right))
    if not systems:
        return starts
    named = tuple(name for operands, _, name in given if operands.erase is not None)
    found, solutions = [], list(solve_unit_lowers(systems, named=named, form=form))
    for start, (operands, tables, _) in zip(starts, given, strict=True):
        if operands.erase is not None and _as_one(tables, form):
            start = start._replace(written=solutions.pop(0))
        elif operands.erase is not None:
            start = start._replace(erased=operands.erase[..., None, :] * solutions.pop(0))
        found.append(start)
    return found


def _as_one(tables: Tables, form: Form) -> bool:
    """Whether writes and erasures are one unknown: without momentum; a kernel keeps them apart."""
    return tables.carried is None and not form.dense


def read_chunk(solved: Solved, queries, *, read: str, anchored=None) -> Float[Array, "..."]:
    """The reads of a chunk's queries [..., n, C] (spec C6.9), [..., m, C].

    Args:
      solved: from `solve_chunk`.
      queries: one for each token.
      read: "running_prev", "running" or "anchor".
      anchored: W_0 @ queries where the caller has it already.
    """
    if read == "anchor":
        return nn(solved.initial, queries, solved.form) if anchored is None else anchored
    before, tables, form = read == "running_prev", solved.tables, solved.form
    out = _from_start(queries, anchored, solved, before=before)
    scores = tn(queries, solved.x, form)
    write = tables.write_before if before else tables.write
    if solved.erased is None:
        return out - nt(solved.written, write * scores, form)
    # Without momentum both decay alike and share one product. With it only writes go through the
    # momentum (kap); what is erased is erased from the memory itself (Gam).
    if tables.carried is None:
        return out - nt(solved.written + solved.erased, write * scores, form)
    decay = tables.decay_before if before else tables.decay
    return out - nt(solved.written, write * scores, form) - nt(solved.erased, decay * scores, form)


def write_chunk(solved: Solved) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """The memory and the momentum after the chunk's last token."""
    tables = solved.tables
    change = tables.write[..., -1, None, :] * solved.written
    if solved.erased is not None:
        change = change + tables.decay[..., -1, None, :] * solved.erased
    final = solved.initial
    if tables.decay_start is not None:
        final = tables.decay_start[..., -1, None, None] * final
    final = final - nt(change, solved.x, solved.form)
    momentum = solved.initial_momentum
    if tables.carried is None or momentum is None:
        return final, None
    assert tables.momentum_start is not None and tables.momentum_end is not None
    final = final + tables.carried[..., -1, None, None] * momentum
    velocity = tables.momentum_start[..., -1, None, None] * momentum
    tail = tables.momentum_end[..., None, :] * solved.written
    return final, velocity - nt(tail, solved.x, solved.form)


def delta_chunk_xla(operands: Operands, *, read: str) -> DeltaOutput:
    """One chunk of the recurrence in O(C^2 (m + n) + C m n) (spec C6.8, C6.9).

    Exact for the recurrence of `reference.py`: only the rounding differs.
    """
    tables = chunk_tables(operands.learning_rate, operands.decay, operands.momentum)
    solved = solve_chunk(operands, tables)
    reads = None
    if operands.queries is not None:
        reads = read_chunk(solved, operands.queries, read=read)
    final, velocity = write_chunk(solved)
    return DeltaOutput(reads, final, velocity)


def delta_rule_xla(operands: Operands, *, read: str, chunk_size: int) -> DeltaOutput:
    """Whole sequences: a scan over chunks, each recomputed in the backward pass.

    The tokens beyond the last whole chunk run as a shorter chunk of their own.
    """
    length, start = operands.x.shape[-1], operands.initial
    queries = operands.queries
    if read == "anchor":  # the anchor of the whole call, not of each chunk
        operands = operands._replace(queries=None)
    whole = length // chunk_size * chunk_size
    carry, pieces = (start, operands.initial_momentum), []
    if whole:
        batch = start.shape[:-2]
        tokens = _over_tokens(operands, lambda a: a[..., :whole])
        # Rows of tokens, as the caller had them: slices of them are whole runs of memory.
        tokens = {n: _swapped(a) if n in _MATRICES else a for n, a in tokens.items()}
        carry, reads = chunk_scan(partial(_scanned, read), chunk_size, len(batch), carry, tokens)
        if reads is not None:
            pieces.append(_swapped(reads))
    if whole < length:
        rest = _over_tokens(operands, lambda a: a[..., whole:])
        out = delta_chunk_xla(_with_states(rest, carry), read=read)
        carry = (out.final, out.final_momentum)
        if out.reads is not None:
            pieces.append(out.reads)
    if read == "anchor" and queries is not None:
        reads = nn(start, queries)
    elif queries is None:
        reads = None
    else:
        reads = jnp.concatenate(pieces, axis=-1)
    return DeltaOutput(reads, *carry)


_MATRICES = ("x", "error", "queries")


def _swapped(array):
    return None if array is None else jnp.swapaxes(array, -1, -2)


def _scanned(read, carry, part):
    """One chunk of a scan: tokens are rows there, and columns here."""
    part = {n: _swapped(a) if n in _MATRICES else a for n, a in part.items()}
    out = delta_chunk_xla(_with_states(part, carry), read=read)
    return (out.final, out.final_momentum), _swapped(out.reads)


def _with_states(tokens, carry) -> Operands:
    return Operands(**tokens, initial=carry[0], initial_momentum=carry[1])


def _over_tokens(operands: Operands, function) -> dict:
    """Apply `function(array)` to every per-token operand but `anchored`, which is of one state."""
    names = ("x", "error", "learning_rate", "decay", "erase", "momentum", "queries")
    arrays = {name: getattr(operands, name) for name in names}
    return {name: None if a is None else function(a) for name, a in arrays.items()}
