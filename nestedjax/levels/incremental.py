"""Levels that read a token of an unfinished period in O(1), although it sees the earlier ones."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestedjax.levels.branch import select, when
from nestedjax.levels.level import Level, PyTree, due
from nestedjax.levels.run import (
    Carry,
    advance_position,
    put_token,
    renewed,
    run,
    run_some,
    token_count,
)


class Unfinished(NamedTuple):
    """What is pending of an incremental level; all zeros at a period's start.

    Attributes:
      tokens: like x, [period, ...]: the tokens of the unfinished period, zeros beyond them.
      notes: what the level keeps about these tokens.
      kept: whether `notes` are those of `tokens`. Calls with more than one token leave them out;
        the next call with one token makes them, in O(period).
    """

    tokens: PyTree
    notes: PyTree
    kept: jax.Array  # shape=(), dtype=bool


def incremental(
    level: Level, *, start: Callable[..., PyTree], token: Callable[..., tuple[PyTree, PyTree]]
) -> Level:
    """The same level, with notes on its unfinished period that make a single token O(1).

    For a level that reads with more than the state of its period's start, such as a memory whose
    token t sees what tokens 1..t-1 of its chunk have written. Calls with any other number of tokens
    are those of `level`; a `Carry` goes from one kind of call to the other and back. The write at
    the period's end is `level.step` on the whole period in any case.

    Args:
      level: a plain level with a period.
      start: `start(params, state) -> notes` at a period's start.
      token: `token(params, state, notes, x) -> (notes, y)`, the notes with one more token in them
        and the output of that token; `state` is that of the period's start.

    Returns:
      A `Level` whose `Carry` has an `Unfinished` where that of `level` has tokens.

    Raises:
      ValueError: if the level has no period or is a composition.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import levels
      >>> def step(params, state, x):  # a sum that every token sees with itself in it
      ...     sums = state + jnp.cumsum(x)
      ...     return sums[-1], sums
      >>> total = levels.Level("total", 4, lambda params: jnp.zeros(()), step)
      >>> total = levels.incremental(
      ...     total,
      ...     start=lambda params, state: state,
      ...     token=lambda params, state, notes, x: (notes + x, notes + x),
      ... )
      >>> y, carry = levels.run(total, None, levels.start(total, None, jnp.ones(1)), jnp.ones(1))
      >>> print(y, carry.pending.notes, carry.pending.tokens)
      [1.] 1.0 [1. 0. 0. 0.]
    """
    if level.period is None or level.advance is not None:
        raise ValueError(f"level {level.name!r} has no period of its own: only its tokens need one")
    if level.period == 1:
        return level  # nothing is ever pending
    plain = level._replace(token=None)

    def advance(params, state, x, reset, valid=None):
        carried = isinstance(state, Carry)
        if carried and valid is None and token_count(x) == 1:
            return _one(level, start, token, params, state, x, reset)
        if carried:
            state = state._replace(pending=state.pending.tokens)
        if valid is None:
            y, carry = run(plain, params, state, x, reset=reset)
        else:
            y, carry = run_some(plain, params, state, x, valid)
        notes = jax.tree.map(jnp.zeros_like, start(params, carry.state))
        pending = Unfinished(carry.pending, notes, carry.position < 0)
        return y, carry._replace(pending=pending)

    return level._replace(advance=advance, token=None)


def _one(level, start, token, params, carry, x, resets):
    """One token, from any position."""
    state = renewed(level, params, carry.state, None if resets is None else jnp.asarray(resets)[0])
    count, held = carry.position % level.period, carry.pending
    new = jax.tree.map(lambda leaf: leaf[0], x)

    @jax.checkpoint  # inside a branch that is hardly ever taken: it shall keep nothing
    def recall(notes):
        def body(notes, inputs):
            pending, index = inputs
            return select(index < count, token(params, state, notes, pending)[0], notes), None

        order = jnp.arange(level.period, dtype=count.dtype)
        return jax.lax.scan(body, notes, (held.tokens, order))[0]

    fresh = (count == 0) | ~held.kept
    notes = select(fresh, start(params, state), held.notes)
    notes = when(fresh & (count > 0), recall, notes)
    notes, y = token(params, state, notes, new)
    tokens = put_token(held.tokens, x, count)

    def write(before):
        after = level.step(params, before[0], before[1].tokens)[0]
        return after, jax.tree.map(jnp.zeros_like, before[1])

    pending = Unfinished(tokens, notes, count >= 0)
    state, pending = when(jnp.asarray(due(carry.position, level.period)), write, (state, pending))
    y = jax.tree.map(lambda leaf: leaf[None], y)
    return y, Carry(state, pending, advance_position(carry.position, 1, resets))
