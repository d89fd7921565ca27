"""Optimizers as memories: the toys, and the M3 study of Figures 11-12 (spec B8, B12, G11).

Claims under test:
  valley, tasks, adam: see optimizer_toys.py
  study   M3 has the lowest loss of AdamW, Muon, AdaMuon, M3 at equal steps; a step of it costs
          about one of AdaMuon (paper: ViT on ImageNet-21K; here gratings of 8x8 pixels and bytes)

Command:   python experiments/optimizers.py --scale cpu   (parts alone: --parts valley tasks)
Data:      generated; the text that ships with the package
Protocol:  study: the rate of each optimizer is the best of the same five on seed 0; then three
           seeds at that rate, at equal steps, and again at the CPU-seconds that AdamW took
Hardware:  2 CPU cores, 9 minutes; --scale gpu is meant for one H100 or H200
Output:    tables, `optimizers.json` and a PNG for each part in --out; what was found is in LOG.md
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import optimizer_toys

from nestedjax import configs, models, optim, runs
from nestedjax.data import ByteTokenizer
from nestedjax.optim.matrices import labels

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

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
    text: tuple[str, ...]  # as --set
    period: int = 20
    b2: float = 0.98


SCALES = {
    "smoke": Scale(50, (3e-3,), (0,), 8, 4, 16, 1, 8, "nano", ("length=32", "batch=2", "layers=1")),
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
        ("length=128", "batch=4", "width=64", "hidden=160"),
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
        ("length=512", "batch=32", "vocab=256"),
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
    batches: Callable[[int, int, int], Any]  # seed, first step, count -> stacked batches
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

    def batches(seed, first, count):
        rng = np.random.default_rng((seed, first))
        many = images(rng, count * scale.batch)
        return jax.tree.map(lambda a: a.reshape(count, scale.batch, *a.shape[1:]), many)

    blocks = {"qkv": AXES, "out": AXES, "up": AXES, "down": AXES, "scales": None}
    axes = {"patches": None, "places": None, "blocks": blocks, "head": None}
    return Problem(init, loss, batches, images(np.random.default_rng(10**6), 2048), axes)


def text(scale: Scale) -> Problem:
    """A Transformer++ on bytes of the text that ships with the package."""
    config = configs.run_preset(f"transformer_{scale.preset}")
    config = configs.change(config, ["vocab=256", *scale.text])
    model = models.create(config.model)
    definition, _ = models.split(model)
    language = runs.language_loss(definition)
    data = {}

    def init(seed: int):
        return models.weights(models.create(config.model, seed=seed))

    def batches(seed, first, count):
        if seed not in data:
            seeded = dataclasses.replace(config, seed=seed)
            data[seed] = runs.datasets(seeded, ByteTokenizer())[0]
        rows = [data[seed][step] for step in range(first, first + count)]
        return jax.tree.map(lambda *a: np.stack(a), *rows)

    held = runs.datasets(config, ByteTokenizer())[1]
    heldout = jax.tree.map(lambda *a: np.concatenate(a), *held[:16])
    axes = models.matrix_axes(model)
    return Problem(init, lambda p, b: language(p, b, None)[0], batches, heldout, axes)


def trainer(problem: Problem, tx: optax.GradientTransformation):
    """Compiled functions: `CHUNK` steps, and the held-out loss."""

    @jax.jit
    def chunk(params, state, batches, first, total, peak):
        def body(held, given):
            params, state = held
            batch, step = given
            warm = jnp.minimum(1.0, (step + 1) / (0.05 * total))
            rate = peak * warm * (0.55 + 0.45 * jnp.cos(jnp.pi * step / total))
            loss, grads = jax.value_and_grad(problem.loss)(params, batch)
            grads, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
            return (params, state), loss

        steps = first + jnp.arange(CHUNK)
        (params, state), losses = jax.lax.scan(body, (params, state), (batches, steps))
        return params, state, losses

    return jax.jit(tx.init), chunk, jax.jit(problem.loss)


def fit(problem: Problem, compiled: tuple, *, rate: float, steps: int, seed: int) -> dict:
    """One run: its training curve, held-out loss and CPU-seconds a step (on an accelerator:
    seconds), compilation excluded."""
    begin, chunk, heldout = compiled
    params = problem.init(seed)
    state = begin(params)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    losses, seconds = [], []
    for first in range(0, steps, CHUNK):
        batches = jax.device_put(problem.batches(seed, first, CHUNK))
        start = clock()
        params, state, part = chunk(params, state, batches, first, float(steps), rate)
        losses += np.asarray(part).tolist()
        seconds.append((clock() - start) / CHUNK)
    usual = statistics.median(seconds[1:] or seconds)  # the first call compiles
    value = float(heldout(params, jax.device_put(problem.heldout)))
    return {"heldout": value, "curve": losses, "seconds": usual, "steps": steps, "rate": rate}


def study(out: Path, scale: Scale) -> dict:
    """Both problems, four optimizers: the best rate, then seeds, at equal steps and seconds."""
    found: dict[str, Any] = {}
    for name, make in (("gratings", gratings), ("text", text)):
        problem, rows = make(scale), {}
        compiled = {n: trainer(problem, tx) for n, tx in optimizers(scale, problem.axes).items()}
        for method, functions in compiled.items():
            grid = [
                fit(problem, functions, rate=r, steps=scale.steps, seed=scale.seeds[0])
                for r in scale.rates
            ]
            best = min(grid, key=lambda row: _worst_if_nan(row["heldout"]))
            others = [
                fit(problem, functions, rate=best["rate"], steps=scale.steps, seed=seed)
                for seed in scale.seeds[1:]
            ]
            tried = {row["rate"]: row["heldout"] for row in grid}
            rows[method] = {"grid": tried, "equal steps": [best, *others]}
        budget = rows["adamw"]["equal steps"][0]["seconds"] * scale.steps
        for method, functions in compiled.items():
            first = rows[method]["equal steps"][0]
            steps = max(int(budget / first["seconds"]) // CHUNK, 1) * CHUNK
            rows[method]["equal seconds"] = (
                rows[method]["equal steps"]
                if method == "adamw"
                else [
                    fit(problem, functions, rate=first["rate"], steps=steps, seed=seed)
                    for seed in scale.seeds
                ]
            )
            _print_row(name, method, rows[method])
        found[name] = rows
    _plot_study(found, out / "study.png")
    return found


def _worst_if_nan(value: float) -> float:
    return value if math.isfinite(value) else math.inf


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
    figure, axes = plt.subplots(2, len(found), figsize=(11, 7), squeeze=False)
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
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    path = given.out / "optimizers.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in given.parts:
        found[part] = PARTS[part](given.out, SCALES[given.scale])
        path.write_text(json.dumps(found, indent=1))
    print(f"written: {path} and a PNG for each part")


if __name__ == "__main__":
    main()
