"""The nested system as data: every box of a model and of its optimizer, slow to fast."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from nestedjax.levels.level import Level, PyTree
from nestedjax.levels.order import Box, order

# Tokens in one optimizer step; with several labels optionally a dict by label, "" for all others.
StepTokens = int | Fraction | Mapping[str, int | Fraction]
# The memories of an optimizer, given the tokens in one of its steps.
OptimizerBoxes = Callable[[StepTokens], list[Box]]


@runtime_checkable
class HasBoxes(Protocol):
    """Anything that lists its own boxes, as the models do."""

    def boxes(self) -> Iterable[Box]:
        """The boxes of one sequence's nested system."""
        ...


def describe(
    system: Level | HasBoxes | Iterable[Box],
    optimizer: OptimizerBoxes | None = None,
    *,
    params: PyTree = None,
    step_tokens: StepTokens = 1,
    dependencies: Mapping[str, Iterable[str]] | None = None,
) -> list[Box]:
    """List the boxes of a nested system, from slow to fast.

    Without an optimizer the slow parameters are frozen. With one they are one more level: what was
    frozen is updated once a step, and each of the optimizer's memories is a box of its own, faster
    than the parameters because their update needs it.

    Args:
      system: a level or composition, an object with a `boxes()` method, or boxes.
      optimizer: `boxes(step_tokens) -> boxes` of the optimizer's memories. `optim.boxes_of(state)`
        is this function for the state of any optax transformation.
      params: the slow parameters: for a level what its `init` takes; with an optimizer, the box
        "parameters" where the system lists no frozen box of its own.
      step_tokens: tokens in one optimizer step; with `optax.partition` or `optim.by_period`
        optionally a dict by label, whose entry "" stands for all others.
      dependencies: see `order`; added to those that compositions bring along, and to the order that
        boxes with a `level` already have.

    Returns:
      The boxes with their `level` filled in, slowest first.

    Raises:
      ValueError: for what `order` raises, and for an optimizer that is no function.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nestedjax import levels, optim
      >>> weights = jnp.zeros((4, 4))
      >>> memories = optim.boxes_of(optax.sgd(0.1, momentum=0.9).init(weights))
      >>> boxes = levels.describe((), memories, params=weights, step_tokens=64)
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
        if not callable(optimizer):
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}, no function of step_tokens: for the"
                " state of an optax transformation give optim.boxes_of(state)"
            )
        boxes = _trained(boxes, params, tokens_of(step_tokens, ""))
        learned = [box.name for box in boxes if box.rule == "optimizer"]
        memories = distinct(optimizer(step_tokens), {box.name for box in boxes})
        _keep_levels(memories, needs)
        for name in learned:  # an update of the parameters needs every memory
            needs.setdefault(name, set()).update(box.name for box in memories)
        boxes += memories
    ordered = order(boxes, needs)
    index = {box.name: i for i, level in enumerate(ordered) for box in level}
    boxes = [dataclasses.replace(box, level=index[box.name]) for box in boxes]
    return sorted(boxes, key=lambda box: index[box.name])


def table(boxes: Iterable[Box]) -> str:
    """Boxes as text, a group for each level, slow to fast; 80 columns for the models here.

    Within a level, boxes that learn the same thing by the same rule stand under one line, which
    says objective, rule and knowledge transfer.

    Args:
      boxes: what `describe` returned.

    Returns:
      Lines, without a line break at the end.

    Example:
      >>> from nestedjax import levels
      >>> boxes = [levels.Box("weights", 64, 12, 0, "next token", "optimizer", "param")]
      >>> print(levels.table(levels.describe(boxes)))
      level 1 of 1, written every 64 tokens                parameters    state bytes
        next token; optimizer; param
          weights                                                  12              0
    """
    boxes = list(boxes)
    found = sorted({box.level for box in boxes}, key=lambda level: -1 if level is None else level)
    wide = max([44, *(len(box.name) for box in boxes)])
    lines: list[str] = []
    for place, level in enumerate(found):
        group = [box for box in boxes if box.level == level]
        title = f"level {place + 1} of {len(found)}, {_written(group[0])}"
        head = "" if place else f"{'parameters':>15}{'state bytes':>15}"
        lines.append(f"{title:{wide + 4}}{head}".rstrip())
        kinds = dict.fromkeys((box.objective, box.rule, box.transfer) for box in group)
        for kind in kinds:
            lines.append("  " + "; ".join(word for word in kind if word))
            lines += [
                f"    {box.name:{wide}}{box.parameters:>15,}{box.state_bytes:>15,}"
                for box in group
                if (box.objective, box.rule, box.transfer) == kind
            ]
    return "\n".join(line for line in lines if line.strip())


def _written(box: Box) -> str:
    """How often the boxes of a level are written."""
    if box.period is None:
        return "frozen"
    if not box.period:
        return "solved anew for every query"
    if box.period == 1:
        return "written at every token"
    period = Fraction(box.period)
    parts = "" if period.denominator == 1 else f"/{period.denominator:,}"
    return f"written every {period.numerator:,}{parts} tokens"


def _level_boxes(level: Level, state: PyTree, prefix: str, needs: dict[str, set[str]]) -> list[Box]:
    """One box for each plain level of a composition, whose state is a tuple in the same order."""
    if not level.parts:
        about = {"objective": "", "rule": "", "transfer": "param"} | dict(level.about or {})
        words = (about["objective"], about["rule"], about["transfer"])
        return [Box(prefix + level.name, level.period, count(state), size(state), *words)]
    boxes: list[Box] = []
    before: list[Box] = []
    sequential = (level.about or {}).get("flow") == "sequence"
    for part, shapes in zip(level.parts, state, strict=True):
        deeper = f"{prefix}{part.name}/" if part.parts else prefix
        new = _level_boxes(part, shapes, deeper, needs)
        if sequential:  # a part's state needs what the one before it has just said
            for box in new:
                needs.setdefault(box.name, set()).update(other.name for other in before)
        boxes, before = boxes + new, [] if _anchored(part) else new
    return boxes


def _anchored(level: Level) -> bool:
    """Whether a level's output needs no state of the same time, only that of the period's start."""
    if level.parts:
        return all(_anchored(part) for part in level.parts)
    return level.period is None or level.token is not None


def _keep_levels(boxes: list[Box], needs: dict[str, set[str]]) -> None:
    """Boxes of one frequency that have a `level` keep their order: a slower one needs every faster.

    The order of boxes of different frequencies is their frequencies' own, which may still change:
    what was frozen beside a block that an optimizer writes is written by it, too.
    """
    placed = [box for box in boxes if box.level is not None]
    for slow in placed:
        faster = {
            box.name
            for box in placed
            if box.frequency == slow.frequency and box.level > slow.level  # type: ignore[operator]
        }
        needs.setdefault(slow.name, set()).update(faster)


def _trained(boxes: list[Box], params: PyTree, period: int | Fraction) -> list[Box]:
    """The boxes with what is frozen inside of a context updated by the optimizer, once a step."""
    boxes = [
        dataclasses.replace(box, period=period, rule="optimizer")
        if box.period is None and box.parameters
        else box
        for box in boxes
    ]
    if params is not None and not any(box.rule == "optimizer" for box in boxes):
        numbers, about = (count(params), size(params)), ("training loss", "optimizer", "backprop")
        boxes = [Box("parameters", period, *numbers, *about), *boxes]
    return boxes


def distinct(boxes: Iterable[Box], taken: Iterable[str] = ()) -> list[Box]:
    """The boxes with a number behind each name that is taken.

    Example:
      >>> from nestedjax.levels import Box
      >>> [box.name for box in distinct([Box("momentum", 1), Box("momentum", 1)])]
      ['momentum', 'momentum 2']
    """
    names, renamed = set(taken), []
    for box in boxes:
        name, number = box.name, 2
        while name in names:
            name, number = f"{box.name} {number}", number + 1
        names.add(name)
        renamed.append(dataclasses.replace(box, name=name))
    return renamed


def tokens_of(step_tokens: StepTokens, label: str) -> int | Fraction:
    """Tokens in one step of a label."""
    if isinstance(step_tokens, Mapping):
        return step_tokens[label] if label in step_tokens else step_tokens.get("", 1)
    return step_tokens


def count(tree: PyTree) -> int:
    """How many numbers a tree of arrays (or shapes, or plain numbers) holds."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def size(tree: PyTree) -> int:
    """Bytes of a tree of arrays (or shapes, or plain numbers, as JAX would hold them)."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(np.shape(leaf)) * jnp.result_type(leaf).itemsize for leaf in leaves)
