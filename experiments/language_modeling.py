"""HOPE, HOPE-Attention and Transformer++ on whole novels, byte by byte (spec G1, scaled down).

Claim under test: at equal parameters and equal training tokens HOPE's held-out loss is not worse
than Transformer++'s (paper: better at 760M parameters and 30B tokens; here four orders of magnitude
smaller, so only the order of the models and its spread over seeds mean anything).

Command:   python experiments/language_modeling.py --scale cpu
Data:      ../shared/data/novels: 41 training novels, 4 held-out ones that no run has seen
Protocol:  each model at the same byte budget; the peak learning rate of each is the best of the
           same three on seed 0 at a third of the steps; then all seeds at that rate
Hardware:  2 CPU cores; --scale gpu is meant for one H100 or H200
Output:    a table, `lm.json`, `lm.png` in --out; what was found is in LOG.md
"""

import argparse
import dataclasses
import json
import resource
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nestedjax import configs, models, runs
from nestedjax.data import ByteTokenizer, DataError, text_dataset
from nestedjax.training import LoopConfig, init_state, train

DATA = Path(__file__).parents[2] / "shared" / "data" / "novels"
COLORS = {"hope": "#2f5d9e", "hope_attention": "#5a9e6f", "transformer": "#d1602a"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a comparison is."""

    size: str  # of the presets
    settings: tuple[str, ...]  # as --set
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    heldout_batches: int


SCALES = {
    "smoke": Scale("nano", ("layers=1", "length=64", "batch=4"), 6, (3e-3,), (0,), 2),
    "cpu": Scale("nano", ("length=256", "batch=8"), 200, (2e-3, 4e-3, 8e-3), (0, 1, 2), 40),
    "gpu": Scale("micro", ("length=1024", "batch=32"), 4000, (5e-4, 1e-3, 2e-3), (0, 1, 2), 100),
}


def run_config(model: str, scale: Scale, *, steps: int, rate: float, seed: int):
    """The run of one model: its preset with the settings that all models share, on bytes."""
    config = configs.run_preset(f"{model}_{scale.size}")
    shared = (*scale.settings, f"steps={steps}", f"warmup={max(steps // 20, 1)}")
    shared += ("context_rows=none",)  # every row a fresh context, for both
    config = configs.change(config, [*shared, f"learning_rate={rate}", f"seed={seed}"])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=256))
    return configs.check(config)


def fit(config, heldout, *, folder: Path) -> dict:
    """Train one model and measure it on the held-out novels.

    Returns:
      `parameters`, `tokens`, `seconds` (of CPU), `loss` (held-out, nats per byte) and `curve`
      ([step, training loss]).
    """
    model = runs.abstract_model(config)
    definition, _ = models.split(model)
    tx, _ = runs.optimizer(config)
    dataset = text_dataset(
        folder / "train",
        ByteTokenizer(),
        length=config.data.length,
        batch=config.data.batch,
        seed=config.seed,
        align=config.model.period,
    )
    curve: list[tuple[int, float]] = []
    before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    weights = jax.jit(lambda: models.weights(runs.new_model(config)))()
    loop = LoopConfig(config.loop.steps, config.loop.steps, config.loop.steps, 10)
    result = train(
        runs.language_loss(definition),
        init_state(weights, tx, seed=config.seed),
        tx=tx,
        dataset=dataset,
        config=loop,
        valid=heldout(config.model.period),
        on_event=lambda event: _record(event, curve),
    )
    return {
        "parameters": models.parameter_count(model),
        "tokens": config.step_tokens * config.loop.steps,
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before, 1),
        "loss": result.record["val_loss"],
        "curve": curve,
    }


def _record(event, curve):
    record = getattr(event, "record", None)
    if isinstance(record, dict):
        curve.append((record["step"], record["loss"]))


def heldout_reader(scale: Scale, length: int, folder: Path):
    """`read(align)`: the same held-out text for every model, in batches of fresh contexts."""

    def read(align: int):
        dataset = text_dataset(
            folder / "heldout", ByteTokenizer(), length=length, batch=8, align=align, order="once"
        )
        # spread over all four novels
        steps = np.linspace(0, len(dataset) - 1, scale.heldout_batches).astype(int)
        return [dataset[int(step)] for step in steps]

    return read


def compare(scale: Scale, folder: Path, names: list[str]) -> list[dict]:
    """Tune the rate of each model on seed 0, then run all seeds."""
    rows = []
    for name in names:
        base = run_config(name, scale, steps=scale.steps, rate=scale.rates[0], seed=0)
        heldout = heldout_reader(scale, base.data.length, folder)
        tuned = {}
        for rate in scale.rates if len(scale.rates) > 1 else ():
            short = max(scale.steps // 3, 1)
            config = run_config(name, scale, steps=short, rate=rate, seed=0)
            tuned[rate] = fit(config, heldout, folder=folder)["loss"]
            print(f"{name}: learning rate {rate:g}, {short} steps: {tuned[rate]:.4f}", flush=True)
        rate = min(tuned, key=tuned.__getitem__) if tuned else scale.rates[0]
        for seed in scale.seeds:
            config = run_config(name, scale, steps=scale.steps, rate=rate, seed=seed)
            row = {"model": name, "seed": seed, "learning_rate": rate}
            rows.append(row | fit(config, heldout, folder=folder) | {"tuning": tuned})
            print(f"{name}: seed {seed}: {rows[-1]['loss']:.4f} nats per byte", flush=True)
    return rows


def report(rows: list[dict]) -> str:
    """One line a model: parameters, tokens, bits per byte with its spread, CPU-seconds."""
    lines = ["| model | parameters | bytes | rate | bits per byte, mean (min, max) | CPU-s |"]
    lines.append("|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        bits = [row["loss"] / float(jnp.log(2.0)) for row in own]
        mean, seconds = statistics.mean(bits), statistics.mean(r["cpu_seconds"] for r in own)
        lines.append(
            f"| {name} | {own[0]['parameters']:,} | {own[0]['tokens']:,} "
            f"| {own[0]['learning_rate']:g} | {mean:.4f} ({min(bits):.4f}, {max(bits):.4f}) "
            f"| {seconds:.0f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Training loss by step, a line a seed, and the held-out loss of each at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
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
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--models", nargs="+", choices=COLORS, default=["hope", "transformer"])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with train/ and heldout/")
    parser.add_argument("--out", type=Path, default=Path("runs/language_modeling"))
    arguments = parser.parse_args()
    if not (arguments.data / "heldout").is_dir():
        raise DataError(f"no novels in {arguments.data}: give a folder with train/ and heldout/")
    rows = compare(SCALES[arguments.scale], arguments.data, arguments.models)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "lm.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, arguments.out / "lm.png")
    print(report(rows))


if __name__ == "__main__":
    main()
