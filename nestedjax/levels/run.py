"""Running a level over a sequence, whole or in pieces: the only update clock in the tree."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestedjax.levels.branch import select, when
from nestedjax.levels.level import Level, PyTree, due


class Carry(NamedTuple):
    """Where one sequence stands inside a system: all that the next tokens need.

    Attributes:
      state: the level's own state at its last write; for a composition a tuple with the `Carry`
        of each of its parts.
      pending: like x, [period, ...]: the tokens of the unfinished period, zeros beyond them. None
        for a frozen level and for a composition, whose parts hold their own.
      position: tokens since the context's start; `position % period` of them are pending.
    """

    state: PyTree
    pending: PyTree
    position: jax.Array  # shape=(), dtype=int32


def run(
    system: Level,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    *,
    reset: jax.Array | np.ndarray | Sequence[bool] | None = None,
) -> tuple[PyTree, Carry]:
    """Feed tokens to a system; any split of a sequence into calls gives what one call gives.

    From a fresh state the whole periods are one `jax.lax.scan` without a masked or wasted step, and
    an unfinished last period is read but not written. From a `Carry`, whose position is traced, the
    pending and the new tokens are shifted onto the period grid: O(T + period), static shapes.

    Args:
      system: a level or a composition of levels.
      params: its slow parameters.
      state: what `system.init(params)` returned (the start of a context), or the `Carry` of an
        earlier call.
      x: arrays with a leading token axis, [T, ...]; one sequence. A batch is `run_batch`.
      reset: bool[T], True at the first token of a new document, which must stand on a boundary of
        the system's (largest) period counted from the context's start.

    Returns:
      y, with a leading token axis [T, ...], and the `Carry` for the tokens that follow.

    Raises:
      ValueError: if the leaves of x differ in length or have other axes than the level reads (a
        batch), if the period is not a positive integer, or if a reset known at trace time stands
        inside a period. A reset that is only known when the program runs (traced) cannot raise:
        then every output and the state of that sequence are NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import levels
      >>> mean = levels.read_write(
      ...     "mean", 3,
      ...     init=lambda params: jnp.zeros(()),
      ...     read=lambda params, state, x: x - state,
      ...     write=lambda params, state, x: x.mean(),
      ... )
      >>> x = jnp.arange(7.0)
      >>> whole, _ = levels.run(mean, None, mean.init(None), x)
      >>> first, carry = levels.run(mean, None, mean.init(None), x[:4])
      >>> rest, carry = levels.run(mean, None, carry, x[4:])
      >>> bool((jnp.concatenate([first, rest]) == whole).all()), int(carry.position)
      (True, 7)
    """
    check_axes(system, x)
    reset = None if reset is None else flags(reset)
    wrong = check_reset(system, state, reset, token_count(x))
    result = _run(system, params, state, x, reset)
    return result if wrong is None else poisoned(wrong, result)


def _run(system, params, state, x, reset):
    """`run`, once it is known that it can."""
    length = token_count(x)
    if system.advance is not None:
        return system.advance(params, state, x, reset)
    if system.period is None:
        return _run_frozen(system, params, state, x, reset)
    if not isinstance(state, Carry):
        return _run_fresh(system, params, state, x, reset)
    if system.period == 1:  # every token is a whole period: nothing can be pending
        y, carry = _run_fresh(system, params, state.state, x, reset)
        return y, carry._replace(position=advance_position(state.position, length, reset))
    if length == 1 and system.token is not None:
        return _run_token(system, params, state, x, reset)
    return _run_shifted(system, params, state, x, reset)


def start(system: Level, params: PyTree, x_like: PyTree) -> Carry:
    """The `Carry` at the start of a context, before its first token.

    Args:
      system: a level or a composition of levels.
      params: its slow parameters.
      x_like: arrays or `jax.ShapeDtypeStruct`s shaped like tokens, [T, ...]; T does not matter.

    Returns:
      A `Carry` with the structure and dtypes that every later `run` returns.
    """
    nothing = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape[1:]), leaf.dtype), x_like)
    return run(system, params, system.init(params), nothing)[1]


def stream(
    system: Level, params: PyTree, state: PyTree, pieces: Iterable[PyTree]
) -> Iterator[tuple[PyTree, Carry]]:
    """Feed tokens as they arrive; compiled once for each length of a piece.

    Args:
      system: a level or a composition of levels.
      params: its slow parameters.
      state: `system.init(params)` or a `Carry`.
      pieces: blocks of tokens, each [T, ...] with any T >= 1.

    Yields:
      For every piece its output [T, ...] and the `Carry` after it.
    """
    advance = jax.jit(partial(run, system))
    for piece in pieces:
        if not isinstance(state, Carry):  # one compilation instead of a fresh one and a later one
            nothing = jax.tree.map(lambda leaf: leaf[:0], piece)
            state = run(system, params, state, nothing)[1]
        y, state = advance(params, state, piece)
        yield y, state


def reset(system: Level, params: PyTree, carry: PyTree, where: jax.Array | np.ndarray) -> PyTree:
    """Start a new context in some sequences of a batch and leave the others untouched.

    Args:
      system: a level or a composition of levels.
      params: its slow parameters, shared by the batch.
      carry: a `Carry`, or a state as `init` returns it, with the axes of `where` in front of every
        array.
      where: bool[B] (or any shape, bool[] for one sequence): which sequences start anew.

    Returns:
      `carry` with state `init(params)`, nothing pending and position 0 where `where` is True.
    """
    where = jnp.asarray(where)
    fresh = fresh_like(system, system.init(params), carry)

    def choose(new, old):
        old = jnp.asarray(old)
        mask = where.reshape(where.shape + (1,) * (old.ndim - where.ndim))
        return jnp.where(mask, jnp.broadcast_to(jnp.asarray(new, old.dtype), old.shape), old)

    return jax.tree.map(choose, fresh, carry)


# Shared with the compositions.


def token_count(x: PyTree) -> int:
    """The common length of the leading axis of every leaf."""
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(x)}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"every array of x needs the same leading token axis, got lengths {lengths}"
        )
    return int(lengths.pop())  # type: ignore[arg-type]


def advance_position(position: jax.Array | int, length: jax.Array | int, resets) -> jax.Array:
    """Tokens since the context's start, after `length` more of them."""
    after = jnp.asarray(position, jnp.int32) + length
    if resets is None or not resets.size:
        return after
    index = jnp.arange(resets.size, dtype=jnp.int32)
    last = jnp.max(jnp.where(jnp.asarray(resets), index, -1))
    return jnp.where(last >= 0, length - last, after)


def flags(reset) -> jax.Array | np.ndarray:
    """Flags as bools, of any array or list."""
    reset = reset if isinstance(reset, jax.Array) else np.asarray(reset)
    return reset if reset.dtype == bool else reset != 0


def check_axes(system: Level, x: PyTree) -> None:
    """Refuse arrays that do not have the axes which the level reads, such as a batch."""
    if system.ndim is None:
        return
    expected = jax.tree.leaves(jax.tree.broadcast(system.ndim, x))
    for leaf, ndim in zip(jax.tree.leaves(x), expected, strict=True):
        if np.ndim(leaf) != ndim:
            raise ValueError(
                f"level {system.name!r} reads one sequence, arrays of {ndim} axes with the tokens"
                f" first, and got shape {np.shape(leaf)}; for a batch use levels.run_batch or"
                " jax.vmap"
            )


def check_reset(system: Level, state: PyTree, resets, length: int) -> jax.Array | None:
    """Validate the period and the resets, whose alignment to it is data.

    Returns:
      bool[] where only the running program can tell whether a reset is misplaced, else None.
    """
    period = system.period
    if period is not None and (not isinstance(period, int) or period < 1):
        raise ValueError(f"level {system.name!r}: period must be None or an integer >= 1: {period}")
    if resets is None:
        return None
    if np.shape(resets) != (length,):
        raise ValueError(
            f"reset has shape {np.shape(resets)}; it needs one bool per token: {length}"
        )
    position = state.position if isinstance(state, Carry) else 0
    if not isinstance(position, int) and position.ndim:  # `per_head`: all of them stand alike
        position = position.reshape(-1)[0]
    return misplaced(f"level {system.name!r}", period, position, resets)


def misplaced(
    what: str,
    period: int | None,
    position: jax.Array | np.ndarray | int,
    resets: jax.Array | np.ndarray,
) -> jax.Array | None:
    """The one rule for documents: they begin on a boundary of the period.

    Args:
      what: whose period it is, for the message.
      period: tokens; None or 1 for what takes documents at any token.
      position: tokens since the context's start, [...].
      resets: bool[..., T].

    Returns:
      None where every document begins well; where it is not known yet, bool[...], True for a
      sequence with a document that does not.

    Raises:
      ValueError: a document is known to begin elsewhere.
    """
    if period in (None, 1):
        return None
    if isinstance(resets, jax.core.Tracer) or isinstance(position, jax.core.Tracer):
        at = jnp.broadcast_to(jnp.asarray(position)[..., None], resets.shape)
        inside = (at + jax.lax.broadcasted_iota(at.dtype, at.shape, at.ndim - 1)) % period != 0
        return jnp.any(jnp.asarray(resets) & inside, axis=-1)
    resets = np.asarray(resets, bool)
    index = np.arange(resets.shape[-1]) + np.asarray(position)[..., None]
    after = np.broadcast_to(index % period, resets.shape)[resets]
    if after.any():
        raise ValueError(
            f"{what}: a document begins {int(after[after > 0][0])} tokens after a boundary of the"
            f" period {period} (a reset); pad each document to a multiple of {period} tokens"
        )
    return None


def poisoned(where: jax.Array, tree: PyTree) -> PyTree:
    """NaN in every floating array of one sequence where True, so that no wrong number goes on."""

    def poison(leaf):
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(where, jnp.asarray(jnp.nan, leaf.dtype), leaf)

    return jax.tree.map(poison, tree)


def run_some(
    system: Level, params: PyTree, carry: Carry, x: PyTree, valid: jax.Array | None
) -> tuple[PyTree, Carry]:
    """`run` from a `Carry` of which only the first `valid` (traced) tokens of x count; None: all.

    Outputs behind the valid tokens are without meaning.
    """
    if valid is None:
        return run(system, params, carry, x)
    if system.advance is not None:
        return system.advance(params, carry, x, None, valid=valid)
    if system.period is None:
        y, after = _run_frozen(system, params, carry, x, None)
        return y, after._replace(position=carry.position + valid)
    return _run_shifted(system, params, carry, x, None, valid)


def fresh_like(system: Level, state: PyTree, carry: PyTree) -> PyTree:
    """A fresh state dressed as `carry` is, with scalars for what is pending (zeros)."""
    if not isinstance(carry, Carry):
        return state
    if system.parts:
        parts = zip(system.parts, state, carry.state, strict=True)
        state = tuple(fresh_like(*part) for part in parts)
    pending = jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), carry.pending)
    return Carry(state, pending, np.zeros((), np.int32))  # type: ignore[arg-type]


def plain_state(system: Level, carry: PyTree) -> PyTree:
    """The state inside a `Carry` as `init` and `step` know it."""
    if not isinstance(carry, Carry):
        return carry
    if not system.parts:
        return carry.state
    return tuple(plain_state(*part) for part in zip(system.parts, carry.state, strict=True))


def renewed(system: Level, params: PyTree, state: PyTree, begin: jax.Array | None) -> PyTree:
    """The state a period starts from: `init` where a document begins."""
    return state if begin is None else select(begin, system.init(params), state)


def put_token(tokens: PyTree, x: PyTree, count: jax.Array) -> PyTree:
    """The pending tokens with one more, x[1, ...], behind the first `count` (traced)."""

    def put(held, new):
        return jax.lax.dynamic_update_slice_in_dim(held, new, count, axis=0)

    return jax.tree.map(put, tokens, x)


# The paths of `run`.


def _run_frozen(system, params, state, x, resets):
    """A level that is never written: one step over any length."""
    position = 0
    if isinstance(state, Carry):
        state, position = state.state, state.position
    _, y = system.step(params, state, x)
    return y, Carry(state, None, advance_position(position, token_count(x), resets))


def _run_fresh(system, params, state, x, resets):
    """From a period boundary known at trace time: scan the whole periods, read the rest."""
    period, length = system.period, token_count(x)
    whole, rest = divmod(length, period)
    grid, tail = _cut(x, whole * period)
    begins = None if resets is None else jnp.asarray(resets)[::period]
    outputs = []
    if whole == 1:  # nothing to loop over
        state = renewed(system, params, state, None if begins is None else begins[0])
        state, y = system.step(params, state, grid)
        outputs.append(y)
    elif whole:
        flags = None if begins is None else begins[:whole]
        state, y = _many_periods(system, params, state, grid, flags)
        outputs.append(y)
    pending = jax.tree.map(lambda leaf: _pad(leaf, period), tail)
    if rest:
        state = renewed(system, params, state, None if begins is None else begins[whole])
        _, y = system.step(params, state, pending)
        outputs.append(jax.tree.map(lambda leaf: leaf[:rest], y))
    if not outputs:
        shapes = jax.eval_shape(system.step, params, state, pending)[1]
        outputs.append(
            jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape[1:]), leaf.dtype), shapes)
        )
    y = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)
    return y, Carry(state, pending, advance_position(0, length, resets))


def _run_shifted(system, params, carry, x, resets, valid=None):
    """From any position: put pending and new tokens on the period grid, commit full periods."""
    period, length = system.period, token_count(x)
    count = carry.position % period
    end = count + (length if valid is None else valid)
    periods = -(-(period - 1 + length) // period)  # enough for every count

    def shift(held, new):
        # One more period than is run, so that the tokens left over can always be sliced out.
        size = (periods + 1) * period
        return jax.lax.dynamic_update_slice_in_dim(_pad(held, size), new, count, axis=0)

    tokens = jax.tree.map(shift, carry.pending, x)
    grid = jax.tree.map(lambda leaf: leaf[: periods * period], tokens)
    commit = (jnp.arange(periods, dtype=jnp.int32) + 1) * period <= end
    begins = None
    if resets is not None:
        # A reset of the pending period was applied by the call that brought its first token.
        begins = shift(jnp.zeros(period, bool), jnp.asarray(resets))[: periods * period : period]
    state, y = _scan_periods(system, params, carry.state, _fold(grid, period), begins, commit)
    y = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, count, length), y)
    if valid is not None:  # what is left over ends with the valid tokens
        tokens = jax.tree.map(lambda leaf: _keep(leaf, end), tokens)
    left = end // period * period
    pending = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, left, period), tokens)
    added = length if valid is None else valid
    return y, Carry(state, pending, advance_position(carry.position, added, resets))


def _run_token(system, params, carry, x, resets):
    """One token of a level that can read it in O(1); the write runs when the period is full."""
    period = system.period
    begin = None if resets is None else jnp.asarray(resets)[0]
    state = renewed(system, params, carry.state, begin)
    y = system.token(params, state, carry.pending, jax.tree.map(lambda leaf: leaf[0], x))

    def write(held):
        state, tokens = held
        return system.step(params, state, tokens)[0], jax.tree.map(jnp.zeros_like, tokens)

    tokens = put_token(carry.pending, x, carry.position % period)
    state, pending = when(jnp.asarray(due(carry.position, period)), write, (state, tokens))
    y = jax.tree.map(lambda leaf: leaf[None], y)
    return y, Carry(state, pending, advance_position(carry.position, 1, resets))


def _many_periods(system, params, state, x, begins=None):
    """Whole periods that all count, x[periods * period, ...], by `whole` or step by step."""
    if system.whole is not None:
        return system.whole(params, state, x, begins)
    return _scan_periods(system, params, state, _fold(x, system.period), begins)


def _scan_periods(system, params, state, grid, begins=None, commit=None):
    """Scan `step` over x[periods, period, ...]; outputs come back as [periods * period, ...]."""

    def body(state, inputs):
        x, begin, keep = inputs
        state = renewed(system, params, state, begin)
        new, y = system.step(params, state, x)
        return (new if keep is None else select(keep, new, state)), y

    state, y = jax.lax.scan(body, state, (grid, begins, commit))
    return state, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), y)


def scan_whole(system: Level, params: PyTree, state: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
    """Run a level over a whole number of its periods from a boundary, as `(state, y)`."""
    if system.period is None or token_count(x) == system.period:
        return system.step(params, state, x)
    return _many_periods(system, params, state, x)


def _cut(x, at):
    """Split the token axis in two."""
    return jax.tree.map(lambda leaf: leaf[:at], x), jax.tree.map(lambda leaf: leaf[at:], x)


def _fold(x, period):
    """[N * period, ...] -> [N, period, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), x)


def _keep(leaf, count):
    """The first `count` tokens (traced), zeros behind them."""
    index = jnp.arange(leaf.shape[0], dtype=jnp.int32).reshape((-1,) + (1,) * (leaf.ndim - 1))
    return jnp.where(jnp.broadcast_to(index < count, leaf.shape), leaf, jnp.zeros_like(leaf))


def _pad(leaf, size):
    """Zeros behind the tokens up to `size` of them."""
    return jnp.pad(leaf, [(0, size - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1))
