"""The loss curve of a run as a picture."""

import os

from nestedjax.training.metrics import read_metrics

INK, TRAIN, SMOOTH, VALID = "#222222", "#b9cbe4", "#2f5d9e", "#d1602a"


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
      ValueError: the run has recorded nothing yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    records = read_metrics(folder)
    if not records:
        raise ValueError(f"{os.fspath(folder)} has no recorded step yet; train first")
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    valid = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
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
    axes.grid(True, color="#e8e8e8", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(os.fspath(path))


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
