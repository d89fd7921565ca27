"""Pictures: where matplotlib is set up, and the loss curve of a run."""

import io
import math
import os
from contextlib import suppress
from typing import Any

from etils import epath

from nestedjax.errors import ConfigError
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
