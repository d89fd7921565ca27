"""Pictures: where matplotlib is set up, the loss curve of a run, and what its model relies on."""

import io
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from etils import epath

from nestedjax.errors import ConfigError
from nestedjax.evaluation import Use
from nestedjax.training import read_metrics

INK, GRID = "#222222", "#e8e8e8"
TRAIN, SMOOTH, VALID = "#b9cbe4", "#2f5d9e", "#d1602a"


def figure(
    width: float | int, height: float | int, *, rows: int = 1, columns: int = 1, **options: Any
) -> Any:
    """An empty picture, drawn without a screen and without matplotlib's global state.

    Args:
      width: in inches.
      height: in inches.
      rows: of axes.
      columns: of axes.
      **options: of `matplotlib.figure.Figure.subplots`, such as `sharey` or `width_ratios`.

    Returns:
      The figure and its axes (one, or an array [rows, columns] without axes of length 1); save it
      with `figure.savefig(path)`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(empty)
    return empty, empty.subplots(rows, columns, **options)


def plot_losses(
    folder: str | os.PathLike, path: str | os.PathLike, *, title: str, unit: str = "nats per token"
) -> None:
    """Draw training and validation loss against the step, as PNG.

    Args:
      folder: run folder, whose `metrics.jsonl` is drawn.
      path: of the picture.
      title: what the run is; the last validation loss is added to it.
      unit: of the loss.

    Raises:
      ConfigError: the run has recorded nothing yet, or its records cannot be read.
      OSError: the picture cannot be written; one that was there stays.
    """
    records = [r for r in read_metrics(folder) if math.isfinite(_number(r.get("loss")))]
    if not records:
        raise ConfigError(f"{os.fspath(folder)} has no recorded step yet; train first")
    steps, losses = [r["step"] for r in records], [_number(r["loss"]) for r in records]
    valid = [(r["step"], _number(r["val_loss"])) for r in records if "val_loss" in r]

    picture, axes = figure(7.2, 4.2)
    axes.plot(steps, losses, color=TRAIN, linewidth=0.8, label="training, each step")
    axes.plot(steps, _smooth(losses), color=SMOOTH, linewidth=1.6, label="training, smoothed")
    final = losses[-1]
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color=VALID, markersize=3.5, label="validation")
        final = valid[-1][1]
        axes.annotate(
            f"{final:.3f}",
            valid[-1],
            xytext=(-4, 8),
            textcoords="offset points",
            color=VALID,
            ha="right",
        )
    kind = "validation" if valid else "training"
    axes.set_title(f"{title}: {kind} loss {final:.3f}", color=INK, loc="left")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(f"loss ({unit})", color=INK)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(picture, epath.Path(path))


def plot_use(rows: Sequence[Use], path: str | os.PathLike, *, title: str) -> None:
    """Draw what each switch of a model costs, as PNG; costs of very different size share a scale.

    Args:
      rows: of `nestedjax.run.evaluate(..., use=True).use`; at least one.
      path: of the picture.
      title: what the run is.

    Raises:
      OSError: the picture cannot be written; one that was there stays.
    """
    switches = list(dict.fromkeys(row.switch for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    picture, axes = figure(7.2, 1.4 + 0.26 * len(rows))
    places, ticks, at = [], [], 0.0
    for name in names:
        own = [row for row in rows if row.name == name]
        ticks.append(at + (len(own) - 1) / 2)
        places += [(row, at + i) for i, row in enumerate(own)]
        at += len(own) + 0.5
    for number, switch in enumerate(switches):
        those = [(row, y) for row, y in places if row.switch == switch]
        errors = [e if math.isfinite(e := row.standard_error) else 0.0 for row, _ in those]
        axes.errorbar(
            [row.delta for row, _ in those],
            [y for _, y in those],
            xerr=errors,
            fmt="o",
            color=(SMOOTH, VALID, "#4d8f5b", INK)[number % 4],
            markersize=4,
            elinewidth=1,
            label=switch.replace("_", " "),
        )
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_yticks(ticks, names)
    axes.invert_yaxis()
    axes.set_title(f"{title}: what is lost without", color=INK, loc="left")
    axes.set_xlabel("loss with the switch, less the loss without (nats per token)", color=INK)
    axes.grid(True, axis="x", color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08, y=1 / (len(rows) + 2))
    picture.legend(frameon=False, loc="outside lower center", ncols=4)
    _save(picture, epath.Path(path))


def _save(picture: Any, path: epath.Path) -> None:
    """Write a PNG in one atomic replacement."""
    drawn = io.BytesIO()
    picture.savefig(drawn, format="png")
    temporary = path.parent / (path.name + ".tmp")
    try:
        temporary.write_bytes(drawn.getvalue())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _number(value: Any) -> float:
    """A number of a record, nan for anything else."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _smooth(losses: list[float]) -> list[float]:
    # Both ways, so that the curve does not lag behind a falling loss.
    return [(a + b) / 2 for a, b in zip(_mean(losses), _mean(losses[::-1])[::-1], strict=True)]


def _mean(losses: list[float]) -> list[float]:
    # An exponential mean over about a fiftieth of the run, without the bias of its start.
    decay = max(0.0, 1 - 50 / max(len(losses), 1))
    mean, weight, smoothed = 0.0, 0.0, []
    for loss in losses:
        mean, weight = decay * mean + (1 - decay) * loss, decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed
