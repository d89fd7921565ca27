"""Optimizers as memories: the toys, and the M3 study of Figures 11-12 (spec B8, B12, G11).

Claims under test:
  valley, tasks, adam: see optimizer_toys.py
  study   M3 has the lowest loss of AdamW, Muon, AdaMuon, M3 at equal steps; a step of it costs
          about one of AdaMuon (paper: ViT on ImageNet-21K; here gratings of 8x8 pixels and bytes)

Command:   python -m experiments.optimizers --scale cpu   (parts alone: --parts valley tasks)
Data:      generated; the text that ships with the package
Protocol:  study: the rate of each optimizer is the best of the same five on seed 0; then three
           seeds at that rate, at equal steps, and again at the CPU-seconds that AdamW took
Hardware:  2 CPU cores, 9 minutes; --scale gpu is meant for one H100 or H200
Output:    tables, `optimizers.json` and a PNG for each part in --out; what was found is in LOG.md
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nestedjax as nj
from experiments import optimizer_toys
from nestedjax import models, optim, run, training
from nestedjax.optim.matrices import labels
from nestedjax.run.plots import figure

AXES = optim.MatrixAxes(-2, -1)
CHUNK = 25  # steps in one call
COLORS = {"adamw": "#888888", "muon": "#2f5d9e", "adamuon": "#5a9e6f", "m3": "#d1602a"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the study is."""

    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    pixels: int
    patch: int
    width: int
    layers: int
    batch: int
    preset: str
    model: dict[str, Any]  # settings of the language model
    run: dict[str, Any]  # and of its run
    period: int = 20
    b2: float = 0.98


SCALES = {
    "smoke": Scale(
        50, (3e-3,), (0,), 8, 4, 16, 1, 8, "nano", {"layers": 1}, {"length": 32, "batch": 2}
    ),
    "cpu": Scale(
        400,
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        (0, 1, 2),
        8,
        2,
        48,
        2,
        64,
        "nano",
        {"width": 64, "hidden": 160},
        {"length": 128, "batch": 4},
    ),
    "gpu": Scale(
        3000,
        (5e-4, 1e-3, 2e-3, 4e-3),
        (0, 1, 2),
        32,
        4,
        192,
        6,
        256,
        "micro",
        {},
        {"length": 512, "batch": 32},
        period=100,
        b2=0.999,
    ),
}


# ---- the M3 study


def optimizers(scale: Scale, axes: Any) -> dict[str, optax.GradientTransformation]:
    """The four, at rate 1: the schedule scales their updates, decay included."""

    def decayed(params):
        return jax.tree.map(lambda kind: kind == "matrix", labels(axes)(params))

    return {
        "adamw": optax.adamw(1.0, 0.9, 0.95, weight_decay=0.1, mask=decayed),
        "muon": optax.contrib.muon(
            1.0,
            beta=0.95,
            weight_decay=0.1,
            adam_b1=0.9,
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=axes,
        ),
        "adamuon": optim.adamuon(1.0, axes=axes),
        "m3": optim.m3(1.0, period=scale.period, b2=scale.b2, axes=axes),
    }


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and its data: what the optimizers are compared on."""

    init: Callable[[int], Any]  # seed -> parameters
    loss: Callable[[Any, Any], jax.Array]  # parameters, batch -> mean loss
    data: Callable[[int], training.Dataset]  # seed -> batches by step
    heldout: Any
    axes: Any


def gratings(scale: Scale) -> Problem:
    """A vision transformer on noisy gratings: 4 orientations x 4 frequencies at any phase."""
    n, patch, width = scale.pixels, scale.patch, scale.width
    tokens, heads = (n // patch) ** 2, max(width // 24, 1)

    def images(rng: np.random.Generator, count: int):
        label = rng.integers(16, size=count)
        angle, turns = label % 4 * np.pi / 4, (label // 4 + 1) * 0.5 * 8 / n
        y, x = np.mgrid[:n, :n]
        along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
        phase = rng.uniform(0, 2 * np.pi, (count, 1, 1))
        image = np.sin(2 * np.pi * turns[:, None, None] * along / 4 + phase)
        image = image * rng.uniform(0.5, 1.5, (count, 1, 1)) + rng.normal(size=image.shape)
        cut = image.reshape(count, n // patch, patch, n // patch, patch).swapaxes(2, 3)
        return {
            "x": cut.reshape(count, tokens, patch * patch).astype(np.float32),
            "label": label.astype(np.int32),
        }

    def init(seed: int):
        keys = iter(jax.random.split(jax.random.key(seed), 8))
        draw = lambda *s, fan: jax.random.normal(next(keys), s) * fan**-0.5  # noqa: E731
        deep, wide = scale.layers, 4 * width
        return {
            "patches": draw(patch * patch, width, fan=patch * patch),
            "places": 0.02 * draw(tokens, width, fan=1),
            "blocks": {
                "qkv": draw(deep, width, 3 * width, fan=width),
                "out": draw(deep, width, width, fan=2 * deep * width),
                "up": draw(deep, width, wide, fan=width),
                "down": draw(deep, wide, width, fan=2 * deep * wide),
                "scales": jnp.ones((deep, 2, width)),
            },
            "head": 0.02 * draw(width, 16, fan=1),
        }

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    def loss(p, batch):
        x = batch["x"] @ p["patches"] + p["places"]

        def block(x, w):
            q, k, v = jnp.split(norm(x, w["scales"][0]) @ w["qkv"], 3, -1)
            q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v))
            mixed = jax.nn.dot_product_attention(q, k, v)
            x = x + mixed.reshape(x.shape) @ w["out"]
            return x + jax.nn.gelu(norm(x, w["scales"][1]) @ w["up"]) @ w["down"], None

        x, _ = jax.lax.scan(block, x, p["blocks"])
        logits = norm(x, 1.0).mean(1) @ p["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    class Gratings:
        """Batches by step, drawn a chunk at a time."""

        def __init__(self, seed: int):
            self.fingerprint = {"gratings": seed}
            draw = lambda first: images(np.random.default_rng((seed, first)), CHUNK * scale.batch)  # noqa: E731
            self._chunk = functools.lru_cache(maxsize=1)(draw)

        def __getitem__(self, step: int):
            at = step % CHUNK * scale.batch
            chunk = self._chunk(step - step % CHUNK)
            return jax.tree.map(lambda a: a[at : at + scale.batch], chunk)

        def iterate(self, start: int):
            return (self[step] for step in range(start, 2**31))

    blocks = {"qkv": AXES, "out": AXES, "up": AXES, "down": AXES, "scales": None}
    axes = {"patches": None, "places": None, "blocks": blocks, "head": None}
    return Problem(init, loss, Gratings, images(np.random.default_rng(10**6), 2048), axes)


def text(scale: Scale) -> Problem:
    """A Transformer++ on bytes of the text that ships with the package."""
    shared = {"vocab": 256, **scale.model}
    config = nj.run_preset(f"transformer_{scale.preset}", shared, **scale.run)
    built, tokenizer = run.build(config), run.tokenizer_of(config)
    language = run.language_loss(built.definition)

    def init(seed: int):
        return models.weights(models.create(config.model, seed=seed))

    def data(seed: int):
        return run.text_of(run.replaced(config, {"seed": seed}), tokenizer)[0]

    _, held = run.text_of(config, tokenizer)
    heldout = jax.tree.map(lambda *a: np.concatenate(a), *held[:16])
    axes = models.matrix_axes(built.model)
    return Problem(init, lambda p, b: language(p, b, None)[0], data, heldout, axes)


class Rate(NamedTuple):
    """The learning rate's schedule as a state: all rates and lengths are then one program."""

    step: jax.Array  # shape=(), dtype=int32
    peak: jax.Array  # shape=()
    total: jax.Array  # shape=(), in steps


def scheduled(peak: float, total: int) -> optax.GradientTransformation:
    """Updates times a rate: up to `peak` over 5% of the steps, then a cosine down to a tenth."""

    def init(params):
        return Rate(jnp.zeros((), jnp.int32), jnp.float32(peak), jnp.float32(total))

    def update(updates, state, params=None):
        warm = jnp.minimum(1.0, (state.step + 1) / (0.05 * state.total))
        rate = state.peak * warm * (0.55 + 0.45 * jnp.cos(jnp.pi * state.step / state.total))
        updates = jax.tree.map(lambda u: rate * u, updates)
        return updates, state._replace(step=state.step + 1)

    return optax.GradientTransformation(init, update)


def fit(
    problem: Problem,
    tx: optax.GradientTransformation,
    *,
    rate: float,
    steps: int,
    seed: int,
) -> dict:
    """One run: its training curve, held-out loss and CPU-seconds a step (on an accelerator:
    seconds), compilation excluded. A run that diverges has an infinite loss."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx, scheduled(rate, steps))
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    losses, times = [], [clock()]

    def watch(event: training.Event) -> None:
        if isinstance(event, training.Stepped):
            losses.append(event.record["loss"])
            if event.step % CHUNK == 0:
                times.append(clock())

    row = {"heldout": math.inf, "curve": losses, "steps": steps, "rate": rate}
    try:
        result = training.train(
            training.stateless(lambda params, batch: (problem.loss(params, batch), {})),
            jax.jit(lambda: training.init_state(problem.init(seed), tx))(),
            tx=tx,
            dataset=problem.data(seed),
            config=training.LoopConfig(steps, steps, steps, steps_per_dispatch=CHUNK),
            valid=[problem.heldout],
            on_event=watch,
        )
        row["heldout"] = result.record["val_loss"]
    except training.TrainingError as error:
        print(f"study   {error}")
    seconds = np.diff(times)
    if seconds.size > 2:  # the first one compiles, the last one validates
        seconds = seconds[1:-1]
    return row | {"seconds": float(np.median(seconds)) / CHUNK if seconds.size else math.inf}


def study(out: Path, scale: Scale) -> dict:
    """Both problems, four optimizers: the best rate, then seeds, at equal steps and seconds."""
    found: dict[str, Any] = {}
    for name, make in (("gratings", gratings), ("text", text)):
        problem, rows = make(scale), {}
        methods = optimizers(scale, problem.axes)
        for method, tx in methods.items():
            grid = [
                fit(problem, tx, rate=r, steps=scale.steps, seed=scale.seeds[0])
                for r in scale.rates
            ]
            best = min(grid, key=lambda row: row["heldout"])
            others = [
                fit(problem, tx, rate=best["rate"], steps=scale.steps, seed=seed)
                for seed in scale.seeds[1:]
            ]
            tried = {row["rate"]: row["heldout"] for row in grid}
            rows[method] = {"grid": tried, "equal steps": [best, *others]}
        budget = rows["adamw"]["equal steps"][0]["seconds"] * scale.steps
        for method, tx in methods.items():
            first = rows[method]["equal steps"][0]
            steps = max(int(budget / first["seconds"]) // CHUNK, 1) * CHUNK
            rows[method]["equal seconds"] = (
                rows[method]["equal steps"]
                if method == "adamw"
                else [
                    fit(problem, tx, rate=first["rate"], steps=steps, seed=seed)
                    for seed in scale.seeds
                ]
            )
            _print_row(name, method, rows[method])
        found[name] = rows
    _plot_study(found, out / "study.png")
    return found


def _print_row(problem: str, method: str, row: dict) -> None:
    cells = []
    for kind in ("equal steps", "equal seconds"):
        values = [run["heldout"] for run in row[kind]]
        spread = max(values) - min(values)
        count = row[kind][0]["steps"]
        cells.append(f"{kind} {statistics.mean(values):.4f} (spread {spread:.4f}, {count} steps)")
    first = row["equal steps"][0]
    cost = f"{1e3 * first['seconds']:.1f} ms a step"
    print(f"study   {problem:9} {method:8} rate {first['rate']:g}: {'; '.join(cells)}; {cost}")


def _plot_study(found: dict, path: Path) -> None:
    picture, axes = figure(11, 7, rows=2, columns=len(found), squeeze=False)
    for column, (problem, rows) in enumerate(found.items()):
        for method, row in rows.items():
            for kind, axis in zip(("equal steps", "equal seconds"), axes[:, column], strict=True):
                curves = np.array([run["curve"] for run in row[kind]])
                width = min(CHUNK, curves.shape[1])
                smooth = np.array([np.convolve(c, np.ones(width) / width, "valid") for c in curves])
                x = np.arange(smooth.shape[1]) + width
                x = x * row[kind][0]["seconds"] if kind == "equal seconds" else x
                axis.plot(x, smooth.mean(0), color=COLORS[method], label=method)
                axis.fill_between(x, smooth.min(0), smooth.max(0), color=COLORS[method], alpha=0.2)
                axis.set(title=f"{problem}, {kind}", ylabel="training loss")
                axis.set_xlabel("seconds" if kind == "equal seconds" else "step")
    axes[0, 0].legend()
    picture.savefig(path, dpi=120)


PARTS = {
    "valley": lambda out, scale: optimizer_toys.valley(out),
    "tasks": lambda out, scale: optimizer_toys.tasks(out),
    "adam": lambda out, scale: optimizer_toys.adam(out),
    "study": study,
}


def main() -> None:
    """Run the chosen parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    # Every rate and seed of an optimizer is the same program.
    jax.config.update("jax_compilation_cache_dir", str(given.out / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    path = given.out / "optimizers.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in given.parts:
        found[part] = PARTS[part](given.out, SCALES[given.scale])
        path.write_text(json.dumps(found, indent=1))
    print(f"written: {path} and a PNG for each part")


if __name__ == "__main__":
    main()
