"""The nested system as data: every box of a model and of its optimizer, slow to fast."""

import dataclasses
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from nestedjax.levels.level import Level, PyTree
from nestedjax.levels.order import Box, order

# What the fields of optax states remember: name, objective, rule.
_MEMORIES = {
    "trace": ("momentum", "dot with the gradient", "gradient step with decay"),
    "mu": ("first moment", "dot with the gradient", "moving average"),
    "nu": ("second moment", "l2 to the squared gradient", "moving average"),
    "ema": ("average", "l2 to the update", "moving average"),
    "sum_of_squares": ("sum of squares", "dot with the squared gradient", "sum"),
    "acc_grads": ("gradient accumulator", "dot with the gradient", "mean of the steps"),
    "left": ("left factor", "l2 to g g^T", "sum or moving average"),
    "right": ("right factor", "l2 to g^T g", "sum or moving average"),
    "basis": ("eigenbasis", "eigenvectors of the factors", "orthogonal iteration"),
    "network": ("gradient network", "from a gradient's rows to their value", "gradient step"),
    "average": ("average key", "l2 to the negative key", "moving average"),
    "operator": ("preconditioner", "l2 from gradient to target", "delta rule"),
    "accumulator": ("mirror accumulator", "dot with the gradient", "gradient step with decay"),
    "start": ("start of the faster block", "loss of its context", "written with its block"),
}
_ACCUMULATOR = _MEMORIES["acc_grads"][0]
EVERY = "every_"  # "every_20" in front of what a state writes once in 20 of its own updates


@runtime_checkable
class HasBoxes(Protocol):
    """Anything that lists its own boxes, as the models do."""

    def boxes(self) -> Iterable[Box]:
        """The boxes of one sequence's nested system."""
        ...


def describe(
    system: Level | HasBoxes | Iterable[Box],
    optimizer: PyTree = None,
    *,
    params: PyTree = None,
    step_tokens: int | Fraction | Mapping[str, int | Fraction] = 1,
    dependencies: Mapping[str, Iterable[str]] | None = None,
) -> list[Box]:
    """List the boxes of a nested system, from slow to fast.

    Without an optimizer the slow parameters are frozen. With one they are one more level: what was
    frozen is updated once a step, and each of the optimizer's memories is a box of its own, faster
    than the parameters because their update needs it.

    Args:
      system: a level or composition, an object with a `boxes()` method, or boxes.
      optimizer: an optax state (arrays or `jax.ShapeDtypeStruct`s). Unknown parts of it are listed
        as "state of <type>".
      params: the slow parameters: for a level what its `init` takes; with an optimizer, the box
        "parameters" where the system lists no frozen box of its own.
      step_tokens: tokens in one optimizer step; with `optax.partition` or `optim.by_period`
        optionally a dict by label, whose entry "" stands for all others.
      dependencies: see `order`; added to those that compositions and optimizer bring along, and
        to the order that boxes with a `level` already have.

    Returns:
      The boxes with their `level` filled in, slowest first.

    Raises:
      ValueError: for what `order` raises.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nestedjax import levels
      >>> weights = jnp.zeros((4, 4))
      >>> state = optax.sgd(0.1, momentum=0.9).init(weights)
      >>> boxes = levels.describe((), state, params=weights, step_tokens=64)
      >>> [(box.level, box.name) for box in boxes]
      [(0, 'parameters'), (1, 'momentum')]
    """
    needs: dict[str, set[str]] = {name: set(names) for name, names in (dependencies or {}).items()}
    if isinstance(system, Level):
        boxes = _level_boxes(system, jax.eval_shape(system.init, params), "", needs)
    else:
        boxes = list(system.boxes() if isinstance(system, HasBoxes) else system)
        _keep_levels(boxes, needs)
    if optimizer is not None:
        boxes = _trained(boxes, params, _tokens_of(step_tokens, ""))
        learned = [box.name for box in boxes if box.rule == "optimizer"]
        step = _tokens_of(step_tokens, "")
        memories = _optimizer_boxes(optimizer, _Clock("", step, step), step_tokens)
        memories = _renamed(memories, {box.name for box in boxes})
        _wire(memories, learned, needs)
        boxes += memories
    ordered = order(boxes, needs)
    index = {box.name: i for i, level in enumerate(ordered) for box in level}
    boxes = [dataclasses.replace(box, level=index[box.name]) for box in boxes]
    return sorted(boxes, key=lambda box: index[box.name])


def table(boxes: Iterable[Box]) -> str:
    """Boxes as aligned text, slow to fast: a line for each, in the order given.

    Args:
      boxes: what `describe` returned.

    Returns:
      A header, a rule and one line per box, without a line break at the end.
    """
    header = "name,period,frequency,parameters,state bytes,objective,rule,transfer".split(",")
    rows = [header]
    for box in boxes:
        period = "frozen" if box.period is None else str(box.period)
        numbers = (period, str(box.frequency), f"{box.parameters:,}", f"{box.state_bytes:,}")
        rows.append([box.name, *numbers, box.objective, box.rule, box.transfer])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        "  ".join(
            cell.rjust(width) if 0 < i < 5 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _level_boxes(level: Level, state: PyTree, prefix: str, needs: dict) -> list[Box]:
    """One box for each plain level of a composition, whose state is a tuple in that order."""
    if not level.parts:
        about = {"objective": "", "rule": "", "transfer": "param"} | dict(level.about or {})
        words = (about["objective"], about["rule"], about["transfer"])
        return [Box(prefix + level.name, level.period, _count(state), _bytes(state), *words)]
    boxes: list[Box] = []
    before: list[Box] = []
    sequential = (level.about or {}).get("flow") == "sequence"
    for part, shapes in zip(level.parts, state, strict=True):
        deeper = f"{prefix}{part.name}/" if part.parts else prefix
        new = _level_boxes(part, shapes, deeper, needs)
        if sequential:  # a part's state needs what the one before it has just said
            for box in new:
                needs.setdefault(box.name, set()).update(other.name for other in before)
        boxes, before = boxes + new, new
    return boxes


def _keep_levels(boxes: list[Box], needs: dict) -> None:
    """Boxes described before stay in the order they were found to have."""
    placed = [box for box in boxes if box.level is not None]
    for slow in placed:
        faster = {box.name for box in placed if box.level > slow.level}  # type: ignore[operator]
        needs.setdefault(slow.name, set()).update(faster)


def _trained(boxes: list[Box], params: PyTree, period: int | Fraction) -> list[Box]:
    """What was frozen in context, updated by the optimizer."""
    boxes = [
        dataclasses.replace(box, period=period, rule="optimizer")
        if box.period is None and box.parameters
        else box
        for box in boxes
    ]
    if params is not None and not any(box.rule == "optimizer" for box in boxes):
        size, space = _count(params), _bytes(params)
        slow = Box("parameters", period, size, space, "training loss", "optimizer", "backprop")
        boxes = [slow, *boxes]
    return boxes


class _Clock(NamedTuple):
    """Where in an optimizer's state a walk is: what it calls things, and how often they change."""

    label: str
    often: int | Fraction  # tokens between two gradients
    period: int | Fraction  # tokens between two writes

    def at(self, key: str, step_tokens: Any) -> "_Clock":
        """Inside the part of the state that is stored under a key."""
        label = f"{self.label} {key}".strip()
        if key.startswith(EVERY):
            count = int(key.removeprefix(EVERY))
            return _Clock(label.replace("_", " "), self.period, self.period * count)
        if isinstance(step_tokens, Mapping) and key in step_tokens:
            return _Clock(label, self.often, step_tokens[key])
        return self._replace(label=label)


def _optimizer_boxes(state: Any, clock: _Clock, step_tokens: Any) -> list[Box]:
    """The memories of an optax state."""
    if isinstance(state, Mapping):
        return [
            box
            for key, part in state.items()
            for box in _optimizer_boxes(part, clock.at(str(key), step_tokens), step_tokens)
        ]
    if not isinstance(state, tuple):
        return []
    fields = getattr(state, "_fields", None)
    if fields is None:
        return [box for part in state for box in _optimizer_boxes(part, clock, step_tokens)]
    front = f"{clock.label} " if clock.label else ""
    boxes: list[Box] = []
    rest: list[PyTree] = []
    for field, value in zip(fields, state, strict=True):
        if field in _MEMORIES and _count(value):
            # Gradients are gathered at every step, whatever the period of the write.
            often = clock.often if field == "acc_grads" else clock.period
            boxes.append(_memory_box(front, often, value, *_MEMORIES[field]))
        elif field == "held" and boxes:  # what the memory before it was last read as
            total = boxes[0].state_bytes + _bytes(value)
            boxes[0] = dataclasses.replace(boxes[0], state_bytes=total)
        elif _holds_states(value):
            boxes += _optimizer_boxes(value, clock, step_tokens)
        elif _count(value) > len(jax.tree.leaves(value)):  # more than counters
            rest.append(value)
    if rest:
        what = f"state of {type(state).__name__}"
        boxes.append(_memory_box(front, clock.period, rest, what, "", ""))
    return boxes


def _holds_states(value: Any) -> bool:
    """Whether a field holds other transformations' states rather than arrays like the params."""
    if isinstance(value, Mapping):
        return any(_holds_states(part) for part in value.values())
    if not isinstance(value, tuple):
        return False
    return hasattr(value, "_fields") or any(_holds_states(part) for part in value)


def _wire(memories: list[Box], learned: list[str], needs: dict) -> None:
    """Parameters need every memory; a memory needs the accumulator that feeds it."""
    for name in learned:
        needs.setdefault(name, set()).update(box.name for box in memories)
    for feeder in memories:
        label, found, _ = feeder.name.partition(_ACCUMULATOR)
        for box in memories if found else ():
            if box.name.startswith(label) and _ACCUMULATOR not in box.name:
                needs.setdefault(box.name, set()).add(feeder.name)


def _memory_box(front, period, value, what, objective, rule):
    transfer = "init" if what == _MEMORIES["start"][0] else "gen_context"
    return Box(front + what, period, _count(value), _bytes(value), objective, rule, transfer)


def _renamed(boxes: list[Box], taken: set[str]) -> list[Box]:
    """Number the boxes whose names are taken."""
    renamed = []
    for box in boxes:
        name, number = box.name, 2
        while name in taken:
            name, number = f"{box.name} {number}", number + 1
        taken = taken | {name}
        renamed.append(dataclasses.replace(box, name=name))
    return renamed


def _tokens_of(step_tokens: Any, label: str) -> int | Fraction:
    if isinstance(step_tokens, Mapping):
        return step_tokens[label] if label in step_tokens else step_tokens.get("", 1)
    return step_tokens


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
