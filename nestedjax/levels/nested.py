"""A faster level that lives inside a slower one and starts anew whenever that one steps."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestedjax.levels.branch import select, when
from nestedjax.levels.compose import check_divides, picker, switchable
from nestedjax.levels.level import Level, PerToken, PyTree
from nestedjax.levels.run import (
    Carry,
    advance_position,
    fresh_like,
    plain_state,
    run,
    run_some,
    scan_whole,
    token_count,
)


def nested(
    fast: Level,
    slow: Level,
    reinit: Callable[[PyTree, PyTree], PyTree],
    *,
    name: str = "nested",
) -> Level:
    """The faster level is re-initialised from the slower one's state each time that one steps.

    The slow level reads the fast one's outputs, as in `chain`. At the context's start and after
    every write of the slow level, `fast_state <- reinit(slow_params, slow_state)`, so `fast.init`
    is never called. A frozen `fast` is a network whose weights the slow level generates.

    Args:
      fast: the inner level.
      slow: the outer one; a composition (a `chain`, another `nested`) steps with its own period.
      reinit: `reinit(slow_params, slow_state) -> fast_state`.
      name: the name of the composition.

    Returns:
      A `Level` with the period of `slow`. Its `params` are a dict by level name or the tuple
      (fast, slow); its state is the tuple (fast, slow).

    Raises:
      ValueError: if `slow` is frozen, if the fast period does not divide the slow one, or if the
        two share a name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import levels
      >>> def total(name, period):
      ...     return levels.read_write(
      ...         name, period,
      ...         init=lambda params: jnp.zeros(()),
      ...         read=lambda params, state, x: jnp.broadcast_to(state, x.shape),
      ...         write=lambda params, state, x: state + 1.0,
      ...     )
      >>> system = levels.nested(
      ...     total("fast", 1), total("slow", 3), lambda params, slow_state: 10 * slow_state
      ... )
      >>> _, carry = levels.run(system, (None, None), system.init((None, None)), jnp.zeros(5))
      >>> fast, slow = carry.state
      >>> float(slow.state), float(fast.state)  # one slow write, then two fast ones from 10
      (1.0, 12.0)

    Reference:
      Nested Learning (arXiv 2512.24695), equation 72.
    """
    levels = (fast, slow)
    if slow.period is None:
        raise ValueError(
            f"level {slow.name!r} is frozen, so it never re-initialises {fast.name!r}: give it a"
            " period or use flow"
        )
    if fast.period is not None and fast.period > slow.period:
        raise ValueError(
            f"the fast level {fast.name!r} has period {fast.period}, longer than the period"
            f" {slow.period} of the slow level {slow.name!r}: swap them"
        )
    check_divides(levels)
    pick_fast, pick_slow = picker(levels, 0), picker(levels, 1)

    def init(params: PyTree) -> PyTree:
        state = slow.init(pick_slow(params))
        return reinit(pick_slow(params), state), state

    def step(params: PyTree, state: PyTree, x: PerToken) -> tuple[PyTree, PerToken]:
        fast_params, slow_params = pick_fast(params), pick_slow(params)
        _, y = scan_whole(fast, fast_params, state[0], x)  # its last write is overwritten below
        slow_state, y = scan_whole(slow, slow_params, state[1], y)
        return (reinit(slow_params, slow_state), slow_state), y

    def advance(params, state, x, reset, valid=None):
        if isinstance(state, Carry):
            return _run_carried(system, params, state, x, reset, valid)
        return _run_aligned(system, params, state, x, reset)

    plain = Level(name, slow.period, init, step)
    system = _Nested(slow.period, plain, fast, slow, reinit, pick_fast, pick_slow)
    whole = plain._replace(advance=advance, parts=levels, about={"flow": "sequence"})
    return switchable(whole, levels, lambda parts: nested(parts[0], parts[1], reinit, name=name))


class _Nested(NamedTuple):
    """A nested pair and how to find its params."""

    period: int
    plain: Level  # without `advance`: whole slow periods only
    fast: Level
    slow: Level
    reinit: Callable[[PyTree, PyTree], PyTree]
    pick_fast: Callable[[PyTree], PyTree]
    pick_slow: Callable[[PyTree], PyTree]


def _run_aligned(system: _Nested, params, state, x, resets):
    """From a boundary known at trace time: scan the slow periods, then run inside the last one."""
    period, length = system.period, token_count(x)
    whole = length // period * period
    head, tail = (jax.tree.map(lambda leaf, part=part: leaf[part], x) for part in _halves(whole))
    flags = None if resets is None else resets[:whole]
    y, carry = run(system.plain, params, state, head, reset=flags)
    state = carry.state
    if resets is not None and whole < length:
        state = select(jnp.asarray(resets)[whole], system.plain.init(params), state)
    rest, fast = run(system.fast, system.pick_fast(params), state[0], tail)
    rest, slow = run(system.slow, system.pick_slow(params), state[1], rest)
    y = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), y, rest)
    position = advance_position(0, length, resets)
    return y, _at(Carry((fast, slow), None, position), position)


def _run_carried(system: _Nested, params, carry, x, resets, valid):
    """From any position: one pass of a scan for each slow period that the tokens touch."""
    period, length = system.period, token_count(x)
    count = length if valid is None else valid
    window = min(length, period)
    if not window:
        return _run_nothing(system, params, carry, x)
    segments = -(-(period - 1 + length) // period)
    edges = jnp.arange(segments + 1, dtype=jnp.int32) * period - carry.position % period
    starts, ends = jnp.clip(edges[:-1], 0, count), jnp.clip(edges[1:], 0, count)
    full = edges[1:] <= count
    begins = None
    if resets is not None:
        opens = (edges[:-1] >= 0) & (starts < length)
        begins = opens & jnp.asarray(resets)[jnp.minimum(starts, length - 1)]
    padded = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, window)] + [(0, 0)] * (leaf.ndim - 1)), x)

    def body(held, inputs):
        start, end, begin, done = inputs
        if begin is not None:
            held = _dress(begin, system.plain.init(params), system, held)
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, window), padded)
        # One token is one segment with nothing to hide, which lets the parts read it in O(1).
        some = None if length == 1 and valid is None else end - start
        y, fast = run_some(system.fast, system.pick_fast(params), held[0], part, some)
        y, slow = run_some(system.slow, system.pick_slow(params), held[1], y, some)
        return (_restart(system, params, done, fast, slow), slow), y

    held, y = jax.lax.scan(body, carry.state, (starts, ends, begins, full))
    token = jnp.arange(length, dtype=jnp.int32)
    segment = (token + carry.position % period) // period
    index = jnp.minimum(segment * window + token - starts[segment], segments * window - 1)
    y = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[index], y)
    position = advance_position(carry.position, count, resets)
    return y, _at(Carry(held, None, position), position)


def _run_nothing(system: _Nested, params, carry, x):
    """No token: an empty output."""
    y, _ = run_some(system.fast, system.pick_fast(params), carry.state[0], x, None)
    y, _ = run_some(system.slow, system.pick_slow(params), carry.state[1], y, None)
    return y, carry


def _restart(system: _Nested, params, done, fast, slow):
    """The fast level made anew from the slow one's state, where that one has just stepped."""

    def anew(fast):
        slow_state = plain_state(system.slow, slow)
        fresh = system.reinit(system.pick_slow(params), slow_state)
        return _overwrite(fresh_like(system.fast, fresh, fast), fast)

    return when(done, anew, fast)


def _dress(begin, state, system: _Nested, held):
    """The parts at the start of a context where a document begins."""
    fresh = tuple(
        fresh_like(level, part, carry)
        for level, part, carry in zip((system.fast, system.slow), state, held, strict=True)
    )
    return select(begin, _overwrite(fresh, held), held)


def _overwrite(new, old):
    """`new` with the shapes and dtypes of `old`."""
    return jax.tree.map(lambda a, b: jnp.broadcast_to(jnp.asarray(a, b.dtype), b.shape), new, old)


def _at(carry: PyTree, position: jax.Array) -> PyTree:
    """Every part counts tokens from the context's start, restarted or not."""
    if not isinstance(carry, Carry):
        return carry
    state = jax.tree.map(
        lambda node: _at(node, position), carry.state, is_leaf=lambda n: isinstance(n, Carry)
    )
    return Carry(state, carry.pending, position)


def _halves(at: int) -> tuple[slice, slice]:
    return slice(None, at), slice(at, None)
