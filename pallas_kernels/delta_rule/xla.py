"""The delta rule chunk by chunk in plain jnp: matrix products and one triangular solve (C6.8)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.delta_rule.types import DeltaOutput, Operands


class Tables(NamedTuple):
    """Decay products of one chunk (row t, column i; tokens count from 1, 0 is the anchor).

    Attributes:
      keep: Gam_{i,t} for i <= t, else 0; all ones below the diagonal without a keep gate.
      keep_before: Gam_{i,t-1} for i < t, else 0.
      write: kap_{i,t}, how much of write i is left at t; equal to `keep` without momentum.
      write_before: kap_{i,t-1}.
      keep_start: Gam_{0,t}, or None when it is one.
      momentum_start: The_{0,t}, or None without momentum.
      momentum_end: The_{i,C}, or None without momentum.
      carried: c_t, how much of the initial momentum has reached the memory, or None.
    """

    keep: Float[Array, "*a C C"]
    keep_before: Float[Array, "*a C C"]
    write: Float[Array, "*b C C"]
    write_before: Float[Array, "*b C C"]
    keep_start: Float[Array, "*c C"] | None
    momentum_start: Float[Array, "*d C"] | None
    momentum_end: Float[Array, "*d C"] | None
    carried: Float[Array, "*b C"] | None


def _log_sums(gate):
    # log 0 would give inf - inf; the smallest normal number keeps every difference finite
    return jnp.cumsum(jnp.log(jnp.maximum(gate, jnp.finfo(gate.dtype).tiny)), axis=-1)


def _products(log_sums):
    """exp(s_t - s_i) for i <= t, else 0; masked before exp, so that nothing overflows."""
    length = log_sums.shape[-1]
    difference = log_sums[..., :, None] - log_sums[..., None, :]
    mask = jnp.tril(jnp.ones((length, length), bool))
    mask = mask.reshape((1,) * (difference.ndim - 2) + mask.shape)
    return jnp.exp(jnp.where(mask, difference, -jnp.inf))


def _before(table, *, axis: int, first: float = 0.0):
    """The table one token earlier: row t becomes row t - 1, row 1 becomes `first`."""
    padding = [(0, 0)] * table.ndim
    padding[axis] = (1, 0)
    table = jax.lax.slice_in_dim(table, 0, table.shape[axis] - 1, axis=axis)
    return jnp.pad(table, padding, constant_values=first)


def _tables(operands: Operands) -> Tables:
    dtype, length = operands.x.dtype, operands.x.shape[-2]
    if operands.keep is None:
        keep = jnp.tril(jnp.ones((length, length), dtype))
        keep = keep.reshape((1,) * (operands.rate.ndim - 1) + keep.shape)
        keep_start = None
    else:
        sums = _log_sums(operands.keep)
        keep, keep_start = _products(sums), jnp.exp(sums)
    keep_before = _before(keep, axis=keep.ndim - 2)
    if operands.momentum is None:
        return Tables(keep, keep_before, keep, keep_before, keep_start, None, None, None)
    sums = _log_sums(operands.momentum)
    momentum_start = jnp.exp(sums)
    write = keep @ _products(sums)
    return Tables(
        keep,
        keep_before,
        write,
        _before(write, axis=write.ndim - 2),
        keep_start,
        momentum_start,
        jnp.exp(sums[..., -1:] - sums),
        (keep @ momentum_start[..., None])[..., 0],
    )


def _from_start(rows, operands: Operands, tables: Tables, *, before: bool):
    """What the states at the chunk's start contribute to W_t @ rows_t (to W_{t-1} if before)."""
    out = rows @ jnp.swapaxes(operands.initial, -1, -2)
    if tables.keep_start is not None:
        scale = tables.keep_start
        scale = _before(scale, axis=scale.ndim - 1, first=1.0) if before else scale
        out = scale[..., None] * out
    if tables.carried is not None and operands.initial_momentum is not None:
        scale = tables.carried
        scale = _before(scale, axis=scale.ndim - 1) if before else scale
        velocity = jnp.swapaxes(operands.initial_momentum, -1, -2)
        out = out + scale[..., None] * (rows @ velocity)
    return out


def _solve(lower, right):
    """(I + strict lower triangle) R = right, batch dimensions of size one broadcast."""
    batch = jnp.broadcast_shapes(lower.shape[:-2], right.shape[:-2])
    return _unit_lower_solve(
        jnp.broadcast_to(lower, batch + lower.shape[-2:]),
        jnp.broadcast_to(right, batch + right.shape[-2:]),
    )


@jax.custom_jvp
def _unit_lower_solve(lower, right):
    return jax.lax.linalg.triangular_solve(
        lower, right, left_side=True, lower=True, unit_diagonal=True
    )


@_unit_lower_solve.defjvp
def _unit_lower_solve_jvp(primals, tangents):
    # JAX's own rule masks with a select that has no sharding, which an Explicit mesh refuses.
    (lower, right), (lower_dot, right_dot) = primals, tangents
    solution = _unit_lower_solve(lower, right)
    strict = jnp.tril(jnp.ones(lower.shape[-2:], lower.dtype), -1)
    strict = strict.reshape((1,) * (lower.ndim - 2) + strict.shape)
    change = right_dot - (strict * lower_dot) @ solution
    return solution, _unit_lower_solve(lower, change)


def delta_chunk_xla(operands: Operands, *, read: str) -> DeltaOutput:
    """One chunk of the recurrence in O(C^2 (m + n) + C m n) (spec C6.8, C6.9).

    Exact for the recurrence of `reference.py`: only the rounding differs.
    """
    tables = _tables(operands)
    x = operands.x
    written = operands.rate[..., None] * operands.error
    erased = None
    if operands.erase is not None:
        gram = x @ jnp.swapaxes(x, -1, -2)
        right = _from_start(x, operands, tables, before=True)
        right = right - (tables.write_before * gram) @ written
        lower = tables.keep_before * gram * operands.erase[..., None, :]
        erased = operands.erase[..., None] * _solve(lower, right)
    reads = None
    if operands.queries is not None:
        reads = _read(operands, tables, written, erased, read)
    final, velocity = _write(operands, tables, written, erased)
    return DeltaOutput(reads, final, velocity)


def _read(operands, tables, written, erased, read):
    queries = operands.queries
    if read == "anchor":
        return queries @ jnp.swapaxes(operands.initial, -1, -2)
    before = read == "running_prev"
    out = _from_start(queries, operands, tables, before=before)
    scores = queries @ jnp.swapaxes(operands.x, -1, -2)
    write = tables.write_before if before else tables.write
    if erased is None:
        return out - (write * scores) @ written
    if operands.momentum is None:
        return out - (write * scores) @ (written + erased)
    keep = tables.keep_before if before else tables.keep
    return out - (write * scores) @ written - (keep * scores) @ erased


def _write(operands, tables, written, erased):
    """The states after the chunk's last token."""
    change = tables.write[..., -1, :, None] * written
    if erased is not None:
        change = change + tables.keep[..., -1, :, None] * erased
    final = operands.initial
    if tables.keep_start is not None:
        final = tables.keep_start[..., -1, None, None] * final
    final = final - jnp.swapaxes(change, -1, -2) @ operands.x
    if tables.carried is None:
        return final, None
    final = final + tables.carried[..., -1, None, None] * operands.initial_momentum
    velocity = tables.momentum_start[..., -1, None, None] * operands.initial_momentum
    tail = tables.momentum_end[..., None] * written
    return final, velocity - jnp.swapaxes(tail, -1, -2) @ operands.x


def delta_rule_xla(operands: Operands, *, read: str, chunk_size: int) -> DeltaOutput:
    """Whole sequences: a scan over chunks, each recomputed in the backward pass.

    The tokens beyond the last whole chunk run as a shorter chunk of their own.
    """
    length, start = operands.x.shape[-2], operands.initial
    queries = operands.queries
    if read == "anchor":  # the anchor of the whole call, not of each chunk
        operands = operands._replace(queries=None)
    whole = length // chunk_size * chunk_size
    carry, pieces = (start, operands.initial_momentum), []
    if whole:

        def chunk(carry, part):
            out = delta_chunk_xla(_with_states(part, carry), read=read)
            return (out.final, out.final_momentum), out.reads

        parts = _over_tokens(operands, lambda a, axis: _chunks(a, axis, whole, chunk_size))
        carry, reads = jax.lax.scan(jax.checkpoint(chunk), carry, parts)
        if reads is not None:
            reads = jnp.moveaxis(reads, 0, -3)
            pieces.append(reads.reshape(*reads.shape[:-3], whole, reads.shape[-1]))
    if whole < length:
        rest = _over_tokens(
            operands, lambda a, axis: jax.lax.slice_in_dim(a, whole, length, axis=axis)
        )
        out = delta_chunk_xla(_with_states(rest, carry), read=read)
        carry = (out.final, out.final_momentum)
        if out.reads is not None:
            pieces.append(out.reads)
    if read == "anchor" and queries is not None:
        reads = queries @ jnp.swapaxes(start, -1, -2)
    elif queries is None:
        reads = None
    else:
        reads = jnp.concatenate(pieces, axis=-2)
    return DeltaOutput(reads, *carry)


def _with_states(tokens, carry) -> Operands:
    return Operands(**tokens, initial=carry[0], initial_momentum=carry[1])


def _over_tokens(operands: Operands, function) -> dict:
    """Apply `function(array, token_axis)` to every per-token operand."""
    axes = {"x": 2, "error": 2, "queries": 2, "rate": 1, "keep": 1, "erase": 1, "momentum": 1}
    arrays = {name: getattr(operands, name) for name in axes}
    return {n: None if a is None else function(a, a.ndim - axes[n]) for n, a in arrays.items()}


def _chunks(array, axis, whole, size):
    array = jax.lax.slice_in_dim(array, 0, whole, axis=axis)
    shape = (*array.shape[:axis], whole // size, size, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis, 0)
