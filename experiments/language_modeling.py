"""HOPE, HOPE-Attention and Transformer++ on whole novels, byte by byte (spec G1, scaled down).

Claim under test: at equal parameters and equal training tokens HOPE's held-out loss is not worse
than Transformer++'s (paper: better at 760M parameters and 30B tokens; here four orders of magnitude
smaller, so only the order of the models and its spread over seeds mean anything).

Command:   python -m experiments.language_modeling --scale cpu
Data:      ../shared/data/novels: 41 training novels, 4 held-out ones that no run has seen
Protocol:  each model at the same byte budget; the peak learning rate of each is the best of the
           same three on seed 0 at a third of the steps; then all seeds at that rate
Hardware:  2 CPU cores; --scale gpu is meant for one H100 or H200
Output:    a table, `lm.json`, `lm.png` and a folder for each run in --out (started again, each of
           them continues); what was found is in LOG.md
"""

import argparse
import dataclasses
import json
import math
import resource
import statistics
from pathlib import Path
from typing import Any

import numpy as np

import nestedjax as nj
from nestedjax.data import ByteTokenizer, DataError, text_dataset
from nestedjax.run.plots import figure
from nestedjax.training import read_metrics

DATA = Path(__file__).parents[2] / "shared" / "data" / "novels"
COLORS = {"hope": "#2f5d9e", "hope_attention": "#5a9e6f", "transformer": "#d1602a"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a comparison is."""

    size: str  # of the presets
    model: dict[str, Any]  # settings of each model
    run: dict[str, Any]  # settings of each run
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    heldout_batches: int


SCALES = {
    "smoke": Scale("nano", {"layers": 1}, {"length": 64, "batch": 4}, 6, (3e-3,), (0,), 2),
    "cpu": Scale("nano", {}, {"length": 256, "batch": 8}, 200, (2e-3, 4e-3, 8e-3), (0, 1, 2), 40),
    "gpu": Scale(
        "micro", {}, {"length": 1024, "batch": 32}, 4000, (5e-4, 1e-3, 2e-3), (0, 1, 2), 100
    ),
}


def run_of(name: str, scale: Scale, *, steps: int, rate: float, seed: int):
    """The run of one model: its preset with the settings that all models share, on bytes."""
    return nj.run_preset(
        f"{name}_{scale.size}",
        {"vocab": ByteTokenizer.size, **scale.model},
        **scale.run,
        steps=steps,
        warmup=max(steps // 20, 1),
        learning_rate=rate,
        seed=seed,
        validate_every=steps,
        checkpoint_every=steps,
        steps_per_dispatch=min(steps, 10),
        validation_batches=None,
    )


def fit(name: str, scale: Scale, *, data: Path, out: Path, steps: int, rate: float, seed: int):
    """Train one model and measure it on the held-out novels; goes on where its folder stands.

    Returns:
      `parameters`, `tokens`, `cpu_seconds` (of this process), `loss` (held-out, nats per byte) and
      `curve` ([step, training loss]).
    """
    run = run_of(name, scale, steps=steps, rate=rate, seed=seed)
    options = {"length": run.data.length, "align": run.model.period}
    novels = text_dataset(
        data / "train", ByteTokenizer(), batch=run.data.batch, seed=seed, **options
    )
    heldout = text_dataset(data / "heldout", ByteTokenizer(), batch=8, order="once", **options)
    # The same text for every model, spread over all four novels, each row a fresh context.
    places = np.linspace(0, len(heldout) - 1, scale.heldout_batches).astype(int)
    folder = out / f"{name}-{steps}-{rate:g}-{seed}"
    before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    result = nj.train(run, folder, data=novels, valid_data=[heldout[int(p)] for p in places])
    return {
        "parameters": nj.models.parameter_count(result.trained.model),
        "tokens": run.step_tokens * steps,
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before, 1),
        "loss": result.record["val_loss"],
        "curve": [[r["step"], r["loss"]] for r in read_metrics(folder)],
    }


def compare(scale: Scale, names: list[str], *, data: Path, out: Path) -> list[dict]:
    """Tune the rate of each model on seed 0, then run all seeds."""
    rows = []
    for name in names:
        tuned = {}
        for rate in scale.rates if len(scale.rates) > 1 else ():
            short = max(scale.steps // 3, 1)
            found = fit(name, scale, data=data, out=out, steps=short, rate=rate, seed=0)
            tuned[rate] = found["loss"]
            print(f"{name}: learning rate {rate:g}, {short} steps: {tuned[rate]:.4f}", flush=True)
        rate = min(tuned, key=tuned.__getitem__) if tuned else scale.rates[0]
        for seed in scale.seeds:
            found = fit(name, scale, data=data, out=out, steps=scale.steps, rate=rate, seed=seed)
            row = {"model": name, "seed": seed, "learning_rate": rate}
            rows.append(row | found | {"tuning": tuned})
            print(f"{name}: seed {seed}: {rows[-1]['loss']:.4f} nats per byte", flush=True)
    return rows


def report(rows: list[dict]) -> str:
    """One line a model: parameters, tokens, bits per byte with its spread, CPU-seconds."""
    lines = ["| model | parameters | bytes | rate | bits per byte, mean (min, max) | CPU-s |"]
    lines.append("|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        bits = [row["loss"] / math.log(2) for row in own]
        mean, seconds = statistics.mean(bits), statistics.mean(r["cpu_seconds"] for r in own)
        lines.append(
            f"| {name} | {own[0]['parameters']:,} | {own[0]['tokens']:,} "
            f"| {own[0]['learning_rate']:g} | {mean:.4f} ({min(bits):.4f}, {max(bits):.4f}) "
            f"| {seconds:.0f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Training loss by step, a line a seed, and the held-out loss of each at the end."""
    picture, axes = figure(7.2, 4.2)
    seen = set()
    for row in rows:
        name, curve = row["model"], np.array(row["curve"])
        label = None if name in seen else name
        seen.add(name)
        axes.plot(curve[:, 0], curve[:, 1], color=COLORS[name], linewidth=1.0, label=label)
        axes.plot(curve[-1, 0], row["loss"], "o", color=COLORS[name], markersize=4)
    axes.set_title("Novels, bytes: training loss; dots: held-out novels", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per byte")
    axes.grid(True, color="#e8e8e8", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--models", nargs="+", choices=COLORS, default=["hope", "transformer"])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with train/ and heldout/")
    parser.add_argument("--out", type=Path, default=Path("runs/language_modeling"))
    arguments = parser.parse_args()
    if not (arguments.data / "heldout").is_dir():
        raise DataError(f"no novels in {arguments.data}: give a folder with train/ and heldout/")
    arguments.out.mkdir(parents=True, exist_ok=True)
    names, scale = arguments.models, SCALES[arguments.scale]
    rows = compare(scale, names, data=arguments.data, out=arguments.out)
    (arguments.out / "lm.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, arguments.out / "lm.png")
    print(report(rows))


if __name__ == "__main__":
    main()
