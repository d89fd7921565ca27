"""What an optimizer remembers, as boxes of the nested system: each optimizer's own account of it.

A state lists its memories by a method, `memories()`. What optax's states remember is said once, in
the table of this file. `boxes_of` walks through a whole state and hands the boxes to
`levels.describe`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax

from nestedjax import levels
from nestedjax.levels import Box
from nestedjax.levels.describe import OptimizerBoxes, StepTokens, count, distinct, size, tokens_of
from nestedjax.optim.types import PyTree


class Memory(NamedTuple):
    """One memory of an optimizer, a box in the making.

    Attributes:
      name: what it is called, such as "momentum".
      values: what it has learned: arrays or `jax.ShapeDtypeStruct`s.
      objective: the loss it descends.
      rule: how it descends.
      transfer: how it acts on what it feeds; see `levels.Box`.
      cache: arrays computed from the values and held until the next write; they count as bytes of
        the state, not as numbers learned.
      gathers: whether it takes in every gradient, whatever the period of the state it belongs to.
    """

    name: str
    values: PyTree
    objective: str
    rule: str
    transfer: str = "gen_context"
    cache: PyTree = ()
    gathers: bool = False


class Part(NamedTuple):
    """A state inside of a state.

    Attributes:
      state: another transformation's state, or a tuple or dict of such.
      label: put in front of the names of its memories.
      every: how many updates of the outer state make one update of this one.
    """

    state: Any
    label: str = ""
    every: int = 1


@runtime_checkable
class HasMemories(Protocol):
    """A state that says what it remembers."""

    def memories(self) -> Iterable[Memory | Part]:
        """Its memories, and the states inside of it."""
        ...


def momentum(values: PyTree) -> Memory:
    """A sum of gradients that decays."""
    return Memory("momentum", values, "dot with the gradient", "gradient step with decay")


def first_moment(values: PyTree, *, cache: PyTree = ()) -> Memory:
    """A moving average of gradients."""
    about = "dot with the gradient", "moving average"
    return Memory("first moment", values, *about, cache=cache)


def second_moment(values: PyTree) -> Memory:
    """A moving average of squared gradients."""
    return Memory("second moment", values, "l2 to the squared gradient", "moving average")


def accumulator(values: PyTree) -> Memory:
    """The gradients since the last write, gathered at every call."""
    about = "dot with the gradient", "mean of the steps"
    return Memory("gradient accumulator", values, *about, gathers=True)


def _average(values: PyTree) -> Memory:
    return Memory("average", values, "l2 to the update", "moving average")


def _sum_of_squares(values: PyTree) -> Memory:
    return Memory("sum of squares", values, "dot with the squared gradient", "sum")


# State of optax -> field -> what it is; None for settings. By name, because some of these classes
# are private. Fields that are not named here are looked into, and listed as "state of <type>".
_MOMENTS: dict[str, Callable[[PyTree], Memory] | None] = {"mu": first_moment, "nu": second_moment}
OPTAX: dict[str, dict[str, Callable[[PyTree], Memory] | None]] = {
    "ApplyEvery": {"grad_acc": accumulator},
    "EmaState": {"ema": _average},
    "MultiStepsState": {"acc_grads": accumulator},
    "MuonState": {"mu": first_moment, "ns_coeffs": None},
    "ScaleByAdamState": _MOMENTS,
    "ScaleByAmsgradState": _MOMENTS,
    "ScaleByBeliefState": _MOMENTS,
    "ScaleByLionState": _MOMENTS,
    "ScaleByNovogradState": _MOMENTS,
    "ScaleByRStdDevState": _MOMENTS,
    "ScaleByRStdDevWithCountState": _MOMENTS,
    "ScaleByRmsState": _MOMENTS,
    "ScaleByRmsWithCountState": _MOMENTS,
    "ScaleByRssState": {"sum_of_squares": _sum_of_squares},
    "ScaleBySM3State": _MOMENTS,
    "SophiaState": _MOMENTS,
    "TraceState": {"trace": momentum},
}

_EVERY = "every_"


def every(updates: int) -> str:
    """The key under which a state keeps what it writes once in so many of its own updates."""
    return f"{_EVERY}{updates}"


def periodic(states: Mapping[str, Any]) -> Iterator[Part]:
    """The states of a dict whose keys are `every(updates)`."""
    for key, state in states.items():
        updates = int(key.removeprefix(_EVERY))
        yield Part(state, f"every {updates}", updates)


def boxes_of(state: PyTree) -> OptimizerBoxes:
    """The memories of an optimizer's state, as `levels.describe` takes them.

    Args:
      state: of any optax transformation, as arrays or `jax.ShapeDtypeStruct`s. A state with a
        method `memories()` says itself what it remembers, optax's are known, and of others what is
        more than counters is listed as "state of <type>".

    Returns:
      `boxes(step_tokens) -> list of levels.Box`, slow to fast, with their `level`. `step_tokens` is
      the number of tokens in one optimizer step; with `optax.partition` or `optim.by_period`
      optionally a dict by label, whose entry "" stands for all others.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nestedjax import optim
      >>> boxes = optim.boxes_of(optax.adam(1e-3).init(jnp.zeros((4, 4))))
      >>> [(box.name, box.period, box.state_bytes) for box in boxes(64)]
      [('first moment', 64, 64), ('second moment', 64, 64)]
    """

    def boxes(step_tokens: StepTokens) -> list[Box]:
        found: list[_Found] = []
        step = tokens_of(step_tokens, "")
        _visit(state, _Clock("", step, step, ()), step_tokens, found)
        named = distinct([one.box for one in found])
        needs = {
            box.name: [named[feeder].name for feeder in one.feeders]
            for box, one in zip(named, found, strict=True)
        }
        return levels.describe(named, dependencies=needs)

    return boxes


class _Found(NamedTuple):
    """A box, and the indices of the accumulators whose gradients it is written with."""

    box: Box
    feeders: tuple[int, ...]


class _Clock(NamedTuple):
    """Where in a state a walk is: what it calls things, how often they change, and from what.

    Attributes:
      label: in front of names.
      often: tokens between two gradients.
      period: tokens between two writes.
      feeders: indices of the accumulators that gather between two writes.
    """

    label: str
    often: int | Fraction
    period: int | Fraction
    feeders: tuple[int, ...]

    def at(self, key: str, step_tokens: StepTokens) -> "_Clock":
        """Inside of what is stored under a key, which may be a label with a period of its own."""
        label = f"{self.label} {key}".strip()
        if isinstance(step_tokens, Mapping) and key in step_tokens:
            return self._replace(label=label, period=step_tokens[key])
        return self._replace(label=label)

    def within(self, part: Part) -> "_Clock":
        """Inside of a part of a state."""
        label = f"{self.label} {part.label}".strip()
        if part.every == 1:
            return self._replace(label=label)
        return self._replace(label=label, often=self.period, period=self.period * part.every)


def _visit(state: Any, clock: _Clock, step_tokens: StepTokens, found: list[_Found]) -> None:
    """Append the boxes of a state."""
    if isinstance(state, Mapping) and _holds_states(state):
        for key, part in state.items():
            _visit(part, clock.at(str(key), step_tokens), step_tokens, found)
        return
    if isinstance(state, tuple | list) and not isinstance(state, HasMemories) and not _named(state):
        for part in state:
            _visit(part, clock, step_tokens, found)
        return
    # What gathers comes first: the others need it.
    inside = sorted(_memories(state), key=lambda one: not (isinstance(one, Memory) and one.gathers))
    for one in inside:
        if isinstance(one, Part):
            _visit(one.state, clock.within(one), step_tokens, found)
        elif count(one.values):
            found.append(_Found(_box(one, clock), () if one.gathers else clock.feeders))
            if one.gathers:
                clock = clock._replace(feeders=(*clock.feeders, len(found) - 1))


def _memories(state: Any) -> Iterator[Memory | Part]:
    """What one state says of itself, or what is known of its type."""
    if isinstance(state, HasMemories):
        yield from state.memories()
        return
    kind = type(state)
    known = OPTAX.get(kind.__name__, {}) if kind.__module__.partition(".")[0] == "optax" else {}
    fields = state._asdict() if _named(state) else {"": state}
    rest = []
    for field, value in fields.items():
        if field in known:
            meaning = known[field]
            if meaning is not None:
                yield meaning(value)
        elif field and _holds_states(value):
            yield Part(value)
        elif count(value) > len(jax.tree.leaves(value)):  # more than counters
            rest.append(value)
    if rest:
        what = "an array" if jax.tree_util.all_leaves([state]) else kind.__name__
        yield Memory(f"state of {what}", rest, "", "")


def _box(memory: Memory, clock: _Clock) -> Box:
    # Gradients are gathered at every step, whatever the period of the write.
    period = clock.often if memory.gathers else clock.period
    return Box(
        f"{clock.label} {memory.name}".strip(),
        period,
        count(memory.values),
        size(memory.values) + size(memory.cache),
        memory.objective,
        memory.rule,
        memory.transfer,
    )


def _named(state: Any) -> bool:
    """Whether a state is a NamedTuple."""
    return isinstance(state, tuple) and bool(getattr(type(state), "_fields", ()))


def _holds_states(value: Any) -> bool:
    """Whether a field holds other transformations' states rather than arrays like the params."""
    if isinstance(value, optax.MaskedNode):
        return False
    if isinstance(value, HasMemories) or _named(value) or isinstance(value, optax.EmptyState):
        return True
    if isinstance(value, Mapping):
        return any(_holds_states(part) for part in value.values())
    return isinstance(value, tuple | list) and any(_holds_states(part) for part in value)
