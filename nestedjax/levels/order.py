"""Boxes, the optimization problems a system is made of, and the order of their levels."""

import dataclasses
from collections.abc import Iterable, Mapping
from fractions import Fraction
from math import inf

TRANSFERS = ("", "param", "nonparam", "backprop", "init", "gen_weights", "gen_context")


@dataclasses.dataclass(frozen=True)
class Box:
    """One optimization problem: what it learns, from what, how and how often.

    Attributes:
      name: unique within a system.
      period: tokens between two updates, exact; None for a box that is never updated (frequency 0),
        0 for a non-parametric one that solves its problem anew for every query (infinite).
      parameters: how many numbers it learns.
      state_bytes: bytes of its state for one sequence; of an optimizer's memory, which all
        sequences share, bytes in total.
      objective: the loss it descends.
      rule: how it descends.
      transfer: how knowledge passes between it and its neighbours: "param" (its state is applied to
        the other's output), "nonparam" (its context is), "backprop" (one gradient flow), "init"
        (its start is learned by a slower box), "gen_weights" or "gen_context" (one makes the
        other's weights or data), or "".
      level: place in the order from slow (0) to fast, filled in by `describe`.

    Raises:
      ValueError: if the period is negative or the transfer unknown.

    Reference:
      Nested Learning (arXiv 2512.24695), definition 2 and equations 24-28.
    """

    name: str
    period: int | Fraction | None
    parameters: int = 0
    state_bytes: int = 0
    objective: str = ""
    rule: str = ""
    transfer: str = ""
    level: int | None = None

    def __post_init__(self):
        if self.period is not None and self.period < 0:
            raise ValueError(f"box {self.name!r}: negative period {self.period}")
        if self.transfer not in TRANSFERS:
            raise ValueError(f"box {self.name!r}: {self.transfer!r} is not among {TRANSFERS}")

    @property
    def frequency(self) -> Fraction | float:
        """Updates per token, exact: 0 when frozen, infinite when non-parametric."""
        if self.period is None:
            return Fraction(0)
        return Fraction(1) / Fraction(self.period) if self.period else inf

    def row(self) -> dict[str, str | int | float | None]:
        """The box as values that JSON can hold; fractions as text."""
        row = dataclasses.asdict(self)
        period = self.period
        whole = period is None or Fraction(period).denominator == 1
        row["period"] = period if period is None else int(period) if whole else str(period)
        row["frequency"] = str(self.frequency)
        return row


def order(
    boxes: Iterable[Box], dependencies: Mapping[str, Iterable[str]] | None = None
) -> list[set[Box]]:
    """The levels of a system, from slow to fast.

    A is faster than B if its frequency is higher or, at equal frequency, if the state of B at time
    t needs the state of A at time t. Boxes of which neither is faster share a level.

    Args:
      boxes: the boxes, in any order.
      dependencies: for a box's name the names of the boxes whose state at time t its own state at
        time t needs. Only those of equal frequency matter.

    Returns:
      The levels, slowest first, each a set of boxes.

    Raises:
      ValueError: if two boxes share a name, a dependency names no box, or boxes of equal frequency
        need each other in a circle.

    Example:
      >>> from nestedjax.levels import Box, order
      >>> boxes = [Box("m", 64), Box("weights", 64), Box("v", 64), Box("memory", 1)]
      >>> levels = order(boxes, {"weights": ["m", "v"]})
      >>> [sorted(box.name for box in level) for level in levels]
      [['weights'], ['m', 'v'], ['memory']]

    Reference:
      Nested Learning (arXiv 2512.24695), definition 2. The paper counts levels in both directions;
      here they are listed from slow to fast and never numbered across systems.
    """
    boxes = list(boxes)
    named = {box.name: box for box in boxes}
    if len(named) < len(boxes):
        raise ValueError(f"boxes need different names, got {sorted(box.name for box in boxes)}")
    needs = {name: tuple(others) for name, others in (dependencies or {}).items()}
    unknown = {name for pair in needs.items() for name in (pair[0], *pair[1])} - set(named)
    if unknown:
        raise ValueError(f"dependencies name {sorted(unknown)}; the boxes are {sorted(named)}")
    needs = {
        name: tuple(o for o in others if named[o].frequency == named[name].frequency)
        for name, others in needs.items()
    }
    depths: dict[str, int] = {}
    for name in named:
        _depth(name, needs, depths, ())
    levels: dict[tuple[Fraction | float, int], set[Box]] = {}
    for box in boxes:
        levels.setdefault((box.frequency, -depths[box.name]), set()).add(box)
    return [levels[key] for key in sorted(levels)]


def _depth(name, needs, depths, path):
    """How many boxes of equal frequency come before this one."""
    if name in path:
        circle = " needs ".join(repr(other) for other in (*path[path.index(name) :], name))
        raise ValueError(f"boxes of equal frequency need each other in a circle: {circle}")
    if name not in depths:
        below = [_depth(other, needs, depths, (*path, name)) for other in needs.get(name, ())]
        depths[name] = max(below, default=-1) + 1
    return depths[name]
