"""The nested system as a picture: one row a box, slow at the top, its period along a log axis."""

import os
from math import log2

from nestedjax.levels import Box
from nestedjax.run import NestedSystem
from nestedjax.run.plots import INK, figure

FAINT, BAND = "#8a8a8a", "#f4f5f7"
SLOW, CONTEXT, MEMORY, NONPARAMETRIC = "#2f5d9e", "#d1602a", "#7a9a3a", "#8e63a9"
KINDS = {
    "slow weights": SLOW,
    "memory in context": CONTEXT,
    "memory of the optimizer": MEMORY,
    "non-parametric": NONPARAMETRIC,
}
ROW = 0.3  # inches


def plot(system: NestedSystem, path: str | os.PathLike, *, title: str) -> None:
    """Draw a nested system as PNG.

    Each dot stands at its box's period in tokens, the fastest at the right; its area grows with
    the logarithm of the box's parameters. Rows of one level share a band.

    Args:
      system: from `run.nested_system`.
      path: of the picture.
      title: what it is.
    """
    boxes = system.boxes
    height = 1.5 + ROW * len(boxes)
    picture, (axes, text) = figure(15, height, columns=2, sharey=True, width_ratios=(5, 9))
    places, ticks = _places(boxes)
    for side in (axes, text):
        _bands(side, boxes)
    for row, box in enumerate(boxes):
        x, color = places[box.name], KINDS[_kind(box, system)]
        axes.plot([0, x], [row, row], color=color, linewidth=1, alpha=0.35, zorder=1)
        axes.scatter(x, row, s=18 + 7 * log2(box.parameters + 1), color=color, zorder=2)
    axes.set_yticks(range(len(boxes)), [box.name for box in boxes], color=INK)
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks], color=INK)
    axes.tick_params(axis="x", rotation=90 if len(ticks) > 5 else 0)  # slow periods lie close
    axes.set_xlabel("tokens between two writes, slow to fast (1k = 1,024)", color=INK)
    axes.set_ylim(len(boxes) - 0.5, -0.5)
    axes.grid(True, axis="x", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    _columns(text, boxes)
    for side in (axes, text):
        side.spines[["top", "right", "left", "bottom"]].set_visible(False)
        side.tick_params(length=0)
    present = {_kind(box, system) for box in boxes}
    for kind, color in KINDS.items():
        if kind in present:
            axes.scatter([], [], s=60, color=color, label=kind)
    picture.legend(loc="outside lower right", ncols=4, frameon=False, labelcolor=INK)
    picture.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13)
    picture.savefig(os.fspath(path))


def _kind(box: Box, system: NestedSystem) -> str:
    if box.name in system.optimizer:
        return "memory of the optimizer"
    if box.period == 0:
        return "non-parametric"
    return "slow weights" if box.period is None or box.rule == "optimizer" else "memory in context"


def _places(boxes: list[Box]) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """Where each box stands along the axis, and the axis' ticks: one for each period there is."""
    timed = sorted({float(box.period) for box in boxes if box.period}, reverse=True)
    slowest, fastest = (timed[0], timed[-1]) if timed else (1.0, 1.0)
    frozen, everytime = 0.6, log2(slowest / fastest) + 4

    def place(period) -> float:
        if period is None:
            return frozen
        return everytime if period == 0 else 2 + log2(slowest / float(period))

    ticks = {place(period): _tokens(period) for period in timed}
    if any(box.period is None for box in boxes):
        ticks[frozen] = "frozen"
    if any(box.period == 0 for box in boxes):
        ticks[everytime] = "every query"
    return {box.name: place(box.period) for box in boxes}, sorted(ticks.items())


def _tokens(period: int | float) -> str:
    """A period, short: 32k is 32,768."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if period % size == 0:
            return f"{period / size:,.0f}{unit}"
    return f"{period:,.10g}"


def _bands(side, boxes: list[Box]) -> None:
    for row, box in enumerate(boxes):
        if (box.level or 0) % 2 == 0:
            side.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0, linewidth=0)


def _columns(side, boxes: list[Box]) -> None:
    """Level, parameters, state, objective, rule and transfer of each box as text."""
    heads = ("level", "parameters", "state", "objective", "rule", "transfer")
    columns = (0.05, 0.18, 0.3, 0.33, 0.62, 0.86)
    side.set_xlim(0, 1)
    side.set_xticks([])
    side.tick_params(labelleft=False)
    for x, head in zip(columns, heads, strict=True):
        side.text(x, -0.75, head, color=FAINT, fontsize=8, ha=_align(head), va="bottom")
    for row, box in enumerate(boxes):
        state = _bytes(box.state_bytes) if box.state_bytes else ""
        parameters = f"{box.parameters:,}" if box.parameters else ""
        cells = (box.level, parameters, state, box.objective, box.rule, box.transfer)
        for x, head, cell in zip(columns, heads, cells, strict=True):
            side.text(x, row, cell, color=INK, fontsize=8, ha=_align(head), va="center")


def _align(head: str) -> str:
    return "right" if head in ("level", "parameters", "state") else "left"


def _bytes(size: int) -> str:
    power = min(max(size.bit_length() - 1, 0) // 10, 3)
    return f"{size / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
