"""Composing levels into one system: `chain`, `flow`, `parallel`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
from jaxtyping import Array, Int

from nestedjax.levels.level import Level, PerToken, PyTree, check_switches
from nestedjax.levels.run import Carry, advance_position, run, run_some, scan_whole, token_count

# `describe` reads this: each part depends on the output of the one before it.
_SEQUENCE = {"flow": "sequence"}


def chain(*levels: Level, name: str = "chain") -> Level:
    """Levels one after the other, the fastest first: each reads the output of the one before it.

    `y_l = level_l(y_{l-1})` with periods `C_1 | C_2 | ...`. The levels are sorted by period, so the
    order of listing does not matter; levels of equal period keep it (their data dependency), and
    frozen ones (period None) come last. One period of the chain is a short scan for the fast levels
    and one parallel step for the slowest; no step is masked or wasted.

    Args:
      *levels: levels or compositions, each with a name of its own.
      name: the name of the composition.

    Returns:
      A `Level` whose period is the largest. Its `params` are a dict by level name, or a tuple in
      the order listed here; its state is a tuple in the order of `parts` (fast first).

    Raises:
      ValueError: if a period does not divide the next, or two levels share a name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import levels
      >>> def total(name, period):
      ...     return levels.read_write(
      ...         name, period,
      ...         init=lambda params: jnp.zeros(()),
      ...         read=lambda params, state, x: x + state,
      ...         write=lambda params, state, x: state + params * x.sum(),
      ...     )
      >>> system = levels.chain(total("slow", 4), total("fast", 2))
      >>> system.period, [part.name for part in system.parts]
      (4, ['fast', 'slow'])
      >>> params = {"fast": 1.0, "slow": 0.5}
      >>> y, carry = levels.run(system, params, system.init(params), jnp.ones(6))
      >>> print(y)
      [1. 1. 3. 3. 9. 9.]
    """
    order = sorted(range(len(levels)), key=lambda i: levels[i].period or float("inf"))
    timed = [levels[i] for i in order if levels[i].period is not None]
    for fast, slow in zip(timed, timed[1:], strict=False):
        if slow.period % fast.period:  # type: ignore[operator]
            raise ValueError(_indivisible(fast, slow))
    return _sequence(levels, order, name)


def flow(*levels: Level, name: str = "flow") -> Level:
    """Levels one after the other in the order given, whatever their periods.

    For systems in which a slower level feeds a faster one, as when one memory generates the
    learning rate of another. `chain` is the same with the levels sorted.

    Args:
      *levels: levels or compositions, each with a name of its own.
      name: the name of the composition.

    Returns:
      A `Level` whose period is the largest; `params` and state as for `chain`.

    Raises:
      ValueError: if a period does not divide the largest, or two levels share a name.
    """
    check_divides(levels)
    return _sequence(levels, list(range(len(levels))), name)


def parallel(
    *levels: Level,
    aggregate: Callable[[PyTree, tuple[PerToken, ...]], PerToken] | None = None,
    name: str = "parallel",
) -> Level:
    """Levels side by side: all read the same input, `aggregate` combines their outputs.

    `y = aggregate(weights, (y_1, ..., y_k))`; by default `sum_l weights[l] y_l`, or the plain sum
    when the params hold no weights.

    Args:
      *levels: levels or compositions, each with a name of its own.
      aggregate: `aggregate(weights, outputs) -> y`, each token by itself; `outputs` in the order
        listed, each [N, ...] for some number of tokens N.
      name: the name of the composition.

    Returns:
      A `Level` whose period is the largest. Its `params` are a dict by level name with, optionally,
      the weights under "aggregate", or a tuple in the order listed with, optionally, the weights
      behind it. Its state is a tuple in the order listed.

    Raises:
      ValueError: if a period does not divide the largest, or two levels share a name.

    Reference:
      Nested Learning (arXiv 2512.24695), equation 74: the independent continuum memory.
    """
    check_divides(levels)
    picks = [picker(levels, i) for i in range(len(levels))]
    combine = aggregate or _weighted_sum

    def weights(params: PyTree) -> PyTree:
        if isinstance(params, dict):
            return params.get("aggregate")
        return params[len(levels)] if len(params) > len(levels) else None

    def init(params: PyTree) -> PyTree:
        return tuple(level.init(pick(params)) for level, pick in zip(levels, picks, strict=True))

    def step(params: PyTree, state: PyTree, x: PerToken) -> tuple[PyTree, PerToken]:
        results = [
            scan_whole(level, pick(params), part, x)
            for level, pick, part in zip(levels, picks, state, strict=True)
        ]
        states, outputs = zip(*results, strict=True)
        return states, combine(weights(params), outputs)

    def advance(params, state, x, reset, valid=None):
        parts, position = _parts_of(state)
        results = [
            _feed(level, pick(params), part, x, reset, valid)
            for level, pick, part in zip(levels, picks, parts, strict=True)
        ]
        outputs, carries = zip(*results, strict=True)
        position = advance_position(position, token_count(x) if valid is None else valid, reset)
        return combine(weights(params), outputs), Carry(carries, None, position)

    whole = Level(name, _longest(levels), init, step, advance=advance, parts=tuple(levels))
    return switchable(whole, levels, lambda parts: parallel(*parts, aggregate=aggregate, name=name))


def _sequence(levels: tuple[Level, ...], order: list[int], name: str) -> Level:
    """The levels fed one from the other in `order`, an order of their indices."""
    picks = [picker(levels, i) for i in order]
    parts = tuple(levels[i] for i in order)

    def init(params: PyTree) -> PyTree:
        return tuple(level.init(pick(params)) for level, pick in zip(parts, picks, strict=True))

    def step(params: PyTree, state: PyTree, x: PerToken) -> tuple[PyTree, PerToken]:
        states = []
        for level, pick, part in zip(parts, picks, state, strict=True):
            part, x = scan_whole(level, pick(params), part, x)
            states.append(part)
        return tuple(states), x

    def advance(params, state, x, reset, valid=None):
        held, position = _parts_of(state)
        position = advance_position(position, token_count(x) if valid is None else valid, reset)
        carries = []
        for level, pick, part in zip(parts, picks, held, strict=True):
            x, carry = _feed(level, pick(params), part, x, reset, valid)
            carries.append(carry)
        return x, Carry(tuple(carries), None, position)

    period = _longest(levels)
    whole = Level(name, period, init, step, advance=advance, parts=parts, about=_SEQUENCE)
    return switchable(whole, levels, lambda parts: _sequence(tuple(parts), order, name))


def _feed(level, params, state, x, reset, valid):
    """Run one part of a composition over its input."""
    if valid is None:
        return run(level, params, state, x, reset=reset)
    return run_some(level, params, state, x, valid)


def switchable(
    system: Level, levels: tuple[Level, ...], build: Callable[[Sequence[Level]], Level]
) -> Level:
    """A composition with the memories of its levels; a name that two of them have is qualified.

    Args:
      system: the composition.
      levels: what it was made of.
      build: the same composition of other levels.

    Returns:
      The composition, with "level.memory" in place of a memory's name where it is not unique.
    """
    every = [name for level in levels for name in level.memories]

    def known(level: Level) -> dict[str, str]:
        return {n if every.count(n) == 1 else f"{level.name}.{n}": n for n in level.memories}

    def switched(how: Mapping[str, str]) -> Level:
        check_switches(how, memories)
        parts = []
        for level in levels:
            own = {name: how[full] for full, name in known(level).items() if full in how}
            parts.append(level.switched(own) if own and level.switched is not None else level)
        return build(parts)

    memories = tuple(full for level in levels for full in known(level))
    return system._replace(memories=memories, switched=switched if memories else None)


def picker(levels: tuple[Level, ...], index: int) -> Callable[[PyTree], PyTree]:
    """How to find one level's params among those of the composition."""
    names = [level.name for level in levels]
    if len(set(names)) < len(names):
        raise ValueError(f"levels of one composition need different names, got {names}")
    return partial(_pick, names, index)


def _pick(names: list[str], index: int, params: PyTree) -> PyTree:
    if isinstance(params, dict):
        if names[index] not in params:
            raise ValueError(f"params have no entry {names[index]!r}; they hold {sorted(params)}")
        return params[names[index]]
    if not isinstance(params, tuple | list) or len(params) < len(names):
        raise ValueError(
            f"a composition of {names} takes params as a dict by level name or a tuple in this"
            f" order, got {type(params).__name__}"
        )
    return params[index]


def _parts_of(state: PyTree) -> tuple[tuple[PyTree, ...], Int[Array, ""] | int]:
    """The states of the parts and the position they have reached."""
    return (state.state, state.position) if isinstance(state, Carry) else (state, 0)


def _weighted_sum(weights: PyTree, outputs: tuple[PerToken, ...]) -> PerToken:
    if weights is None:
        return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *outputs)
    return jax.tree.map(
        lambda *leaves: sum(
            (weights[i] * leaf for i, leaf in enumerate(leaves[1:], 1)), weights[0] * leaves[0]
        ),
        *outputs,
    )


def _longest(levels: tuple[Level, ...]) -> int | None:
    return max((level.period for level in levels if level.period is not None), default=None)


def check_divides(levels: tuple[Level, ...]) -> None:
    """Every period divides the largest."""
    slow = max(levels, key=lambda level: level.period or 0)
    for fast in levels:
        if fast.period is not None and slow.period % fast.period:  # type: ignore[operator]
            raise ValueError(_indivisible(fast, slow))


def _indivisible(fast: Level, slow: Level) -> str:
    lower = slow.period // fast.period * fast.period  # type: ignore[operator]
    return (
        f"the period {fast.period} of level {fast.name!r} does not divide the period {slow.period}"
        f" of level {slow.name!r}: give {slow.name!r} the period {lower} or"
        f" {lower + fast.period}"  # type: ignore[operator]
    )
