"""Toys of the paper's optimizer section (B8, B12): run by `optimizers.py`, or alone.

Claims under test:
  valley  delta momentum crosses a curved valley in fewer steps than momentum (Figure 4); the
          paper's constants are unpublished: psi = r^2 + 10 (r - th + sin(3 r))^2 from (-3.5, 2)
  tasks   momentum carries stale directions into the next task and forgets more than plain GD
  adam    with b1 = b2 Adam is the optimal elementwise memory, otherwise not

Command:   python -m experiments.optimizer_toys
Protocol:  valley, tasks: for each method the best of a grid of rates (fewest steps; lowest loss on
           task 1 before task 2); tasks: three seeds
Hardware:  2 CPU cores, about a minute
Output:    printed tables; valley.png and tasks.png in the folder given, or runs/optimizers
"""

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestedjax import optim
from nestedjax.run.plots import figure

AXES = optim.MatrixAxes(-2, -1)


# ---- (i) a curved valley


def valley(out: Path, steps: int = 20_000) -> dict:
    """Steps until psi < 1e-4, at the best rate of a grid."""

    def psi(p: jax.Array) -> jax.Array:
        return p[0] ** 2 + 10 * (p[0] - p[1] + jnp.sin(3 * p[0])) ** 2

    def delta(rate, **given):
        return optim.delta_momentum(rate, weight_decay=0.0, **given)

    methods: dict[str, Callable[[Any], optax.GradientTransformation]] = {
        "gd": optax.sgd,
        "momentum": lambda rate: optim.preconditioned_momentum(
            rate, preconditioner="identity", weight_decay=0.0
        ),
        "delta row": lambda rate: delta(rate, vector_as="row"),
        "delta elementwise": lambda rate: delta(rate, vector_as="elementwise"),
        "delta row, implicit": lambda rate: delta(rate, vector_as="row", implicit=True, erase=1.0),
        "delta row, as printed": lambda rate: delta(
            rate, vector_as="row", normalize_key=False, implicit=False, erase=0.9
        ),
        "adam": lambda rate: optax.adam(rate),
    }
    found: dict[str, Any] = {}
    rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    for name, make in methods.items():

        @jax.jit
        def trajectory(rate, make=make):
            tx, start = make(rate), jnp.array([-3.5, 2.0])

            def body(held, _):
                p, state = held
                updates, state = tx.update(jax.grad(psi)(p), state, p)
                p = p + updates
                return (p, state), (psi(p), p)

            return jax.lax.scan(body, (start, tx.init(start)), None, length=steps)[1]

        best = None
        for rate in rates:
            values, path = jax.device_get(trajectory(jnp.asarray(rate)))
            below = np.flatnonzero(values < 1e-4)
            count = int(below[0]) + 1 if below.size and np.isfinite(values).all() else None
            if count is not None and (best is None or count < best["steps"]):
                best = {"steps": count, "rate": rate, "path": path[:400], "psi": values[:count]}
        found[name] = best or {"steps": None, "rate": None, "path": None, "psi": None}
        print(f"valley  {name:24} {found[name]['steps']} steps at rate {found[name]['rate']}")
    _plot_valley(found, psi, out / "valley.png")
    return {name: {"steps": row["steps"], "rate": row["rate"]} for name, row in found.items()}


def _plot_valley(found: dict, psi: Callable, path: Path) -> None:
    """The first 400 steps of each on the map, and psi by step until it is below 1e-4."""
    r, theta = np.meshgrid(np.linspace(-11, 2, 300), np.linspace(-10, 4, 300))
    height = np.asarray(jax.vmap(psi, 1)(jnp.asarray(np.stack([r.ravel(), theta.ravel()]))))
    picture, (map_axis, axis) = figure(12, 5, columns=2)
    map_axis.contourf(r, theta, np.log10(height.reshape(r.shape) + 1e-4), levels=20, cmap="Greys")
    for name, row in found.items():
        if row["path"] is None:
            axis.plot([], [], " ", label=f"{name}: never")
            continue
        track = np.array([[-3.5, 2.0], *row["path"]])
        (line,) = map_axis.plot(*track.T, lw=1.0)
        steps = np.arange(1, row["steps"] + 1)
        axis.loglog(steps, row["psi"], color=line.get_color(), label=f"{name}: {row['steps']:,}")
    map_axis.set(xlabel="r", ylabel="theta", title="the valley (light), first 400 steps")
    axis.set(xlabel="step", ylabel="psi", title="until psi < 1e-4, best rate of each: steps")
    axis.legend(fontsize=8)
    picture.savefig(path, dpi=120)


# ---- (ii) one task after another

WIDTH, OUTPUTS, SAMPLES, HALF = 16, 8, 64, 8


def two_tasks(seed: int, cosine: float) -> list[jax.Array]:
    """Inputs of two tasks in orthogonal (cosine 0) or overlapping subspaces, and their targets."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    first, rest = basis[:, :HALF], basis[:, HALF:]
    second = cosine * first + math.sqrt(1 - cosine**2) * rest
    x = [rng.normal(size=(SAMPLES, HALF)) @ b.T for b in (first, second)]
    y = [a @ rng.normal(size=(WIDTH, OUTPUTS)) / 4 for a in x]
    return [jnp.asarray(a, jnp.float32) for a in (*x, *y)]


def tasks(out: Path) -> dict:
    """Loss on task 1 before and after task 2, which comes early (its memory is full) or late."""
    methods: dict[str, Callable[[Any], optax.GradientTransformation]] = {
        "gd": optax.sgd,
        "momentum": lambda r: optim.preconditioned_momentum(
            r, preconditioner="identity", weight_decay=0.0
        ),
        "delta momentum": lambda r: optim.delta_momentum(r, axes=AXES, weight_decay=0.0),
        "dgd": lambda r: optim.dgd(r, rest=optax.sgd(r)),
        "adam": optax.adam,
    }

    def compiled(make, steps):
        def run(rate, x1, x2, y1, y2):
            tx = make(rate)
            params = {"kernel": jnp.zeros((WIDTH, OUTPUTS)), "tap": jnp.zeros((WIDTH, WIDTH))}

            def loss(p, x, y):
                out = optim.tapped_linear(x, p["kernel"], p["tap"])
                return jnp.mean(jnp.sum((out - y) ** 2, -1))

            def body(held, late):
                p, state = held
                x, y = jnp.where(late, x2, x1), jnp.where(late, y2, y1)
                updates, state = tx.update(jax.grad(loss)(p, x, y), state, p)
                p = {**p, "kernel": p["kernel"] + updates["kernel"]}
                return (p, state), loss(p, x1, y1)

            late = jnp.arange(2 * steps) >= steps
            return jax.lax.scan(body, (params, tx.init(params)), late)[1]

        return jax.jit(run)

    found = {}
    picture, axes = figure(10, 7, rows=2, columns=2)
    for row_axes, steps in zip(axes, (15, 200), strict=True):
        functions = {name: compiled(make, steps) for name, make in methods.items()}
        for axis, cosine in zip(row_axes, (0.0, 0.3), strict=True):
            for name, run in functions.items():
                row = _best_rate(run, cosine, steps)
                key = f"{name}, cos {cosine}, {steps} steps"
                found[key] = {n: row[n] for n in ("rate", "before", "after")}
                axis.semilogy(np.mean(row["curves"], 0) + 1e-9, label=name)
                print(
                    f"tasks   {key:38} rate {row['rate']:<6g} task 1"
                    f" {statistics.mean(row['before']):.2e} before,"
                    f" {statistics.mean(row['after']):.2e} after task 2"
                )
            axis.set(xlabel="step", title=f"loss on task 1; task 2 from step {steps}, cos {cosine}")
    axes[0, 0].legend(fontsize=7)
    picture.savefig(out / "tasks.png", dpi=120)
    return found


def _best_rate(run: Callable, cosine: float, steps: int) -> dict:
    rows = []
    for rate in (1e-3, 3e-3, 1e-2, 3e-2, 0.1):
        curves = [np.asarray(run(rate, *two_tasks(seed, cosine))) for seed in range(3)]
        before = [float(curve[steps - 1]) for curve in curves]
        if np.isfinite(curves).all():
            after = [float(curve[-1]) for curve in curves]
            rows.append({"rate": rate, "before": before, "after": after, "curves": curves})
    return min(rows, key=lambda row: statistics.mean(row["before"]))


# ---- Adam as the optimal elementwise memory


def adam(out: Path) -> dict:
    """How far Adam's direction is from the minimiser of the weighted elementwise problem (B8)."""
    rng, found = np.random.default_rng(0), {}
    g = rng.normal(size=(200, 1000)) + 0.3 * rng.normal(size=(1, 1000))
    for b1, b2 in ((0.9, 0.9), (0.99, 0.99), (0.9, 0.95), (0.9, 0.999)):
        tx = optax.scale_by_adam(b1, b2, eps=1e-12)
        state = tx.init(jnp.zeros(1000))
        for row in g:
            update, state = tx.update(jnp.asarray(row, jnp.float32), state)
        weight = b2 ** np.arange(199, -1, -1)[:, None]
        h = (weight * g**2).sum(0)
        best = (weight * g).sum(0) * np.sqrt(h / weight.sum()) / h
        error = np.linalg.norm(np.asarray(update) - best) / np.linalg.norm(best)
        cosine = float(np.asarray(update) @ best / np.linalg.norm(update) / np.linalg.norm(best))
        found[f"b1 {b1}, b2 {b2}"] = {"relative distance": float(error), "cosine": cosine}
        print(f"adam    b1 {b1} b2 {b2}: distance {error:.1e}, cosine {cosine:.3f}")
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/optimizers")
    folder.mkdir(parents=True, exist_ok=True)
    for part in (valley, tasks, adam):
        part(folder)
