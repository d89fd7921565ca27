"""Step time and state of every optimizer, relative to AdamW, on one language model.

A training step is its forward and backward pass, the same for all, and an update; both are timed
apart, in CPU-seconds of this process (seconds on an accelerator), over whole periods of what is
written once in a while.

    nestedjax bench optimizers
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

STEPS = 20  # one period of M3, two of SOAP
# An eigendecomposition of every factor at every step: fewer steps say it as well.
SLOW = {"shampoo": 3}


def optimizers(axes: Any) -> dict[str, Any]:
    """Everything in `nestedjax.optim.menu` and optax's Muon, with their defaults; AdamW first."""
    import optax

    from nestedjax.optim import menu

    own = {name: menu.make(name, 1e-3, axes=axes) for name in menu.OPTIMIZERS}
    muon = optax.contrib.muon(1e-3, consistent_rms=0.2, muon_weight_dimension_numbers=axes)
    return {"adamw": own.pop("adamw"), "muon (optax)": muon, **own}


def measure(
    preset: str = "transformer_micro", *, batch: int = 4, length: int = 256, names: Sequence = ()
) -> Iterator[dict[str, Any]]:
    """One row an optimizer, AdamW's first; each as soon as it is measured.

    Args:
      preset: of the model.
      batch: rows of a step.
      length: tokens of a row.
      names: which optimizers; none for all.

    Yields:
      Rows of `optimizer`, `update_seconds`, `step_seconds`, `step_ratio` and `state_ratio` to
      AdamW's, `state_bytes`, `parameters`.
    """
    import jax

    from nestedjax import models, run

    config = run.run_preset(preset, batch=batch, length=length)
    model = models.create(config.model)
    axes, base = models.matrix_axes(model), None
    forward = _forward(model, config)
    for name, tx in optimizers(axes).items():
        if names and name not in (*names, "adamw"):
            continue
        used, passes = model, forward
        if name == "dgd":  # its layers hand out their inputs too
            used = models.add_taps(models.create(config.model))
            tx, passes = optimizers(models.matrix_axes(used))[name], _forward(used, config)
        params = models.weights(used)
        state = jax.jit(tx.init)(params)
        grads = jax.tree.map(lambda p: p * 1e-3 + 1e-4, params)
        seconds = _seconds(jax.jit(tx.update), grads, state, params, SLOW.get(name, STEPS))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        row = {
            "optimizer": name,
            "parameters": models.parameter_count(model),
            "state_bytes": size,
            "update_seconds": seconds,
            "step_seconds": seconds + passes,
        }
        base = base or row
        row["step_ratio"] = row["step_seconds"] / base["step_seconds"]
        row["state_ratio"] = size / base["state_bytes"]
        yield row


HEAD = "| optimizer | update, ms | step / AdamW | state / AdamW |\n|---|---|---|---|"


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table under `HEAD`."""
    return (
        f"| {row['optimizer']} | {1e3 * row['update_seconds']:.0f} |"
        f" {row['step_ratio']:.2f} | {row['state_ratio']:.2f} |"
    )


def _clock() -> Callable[[], float]:
    import jax

    return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def _forward(model: Any, config: Any) -> float:
    """Seconds of a forward and backward pass: the median of five after one that compiles."""
    import jax
    import jax.numpy as jnp

    from nestedjax import models, run

    definition, params = models.split(model)
    loss = run.language_loss(definition)
    shape = config.data.batch, config.data.length
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab)
    batch = {
        "tokens": tokens,
        "targets": tokens,
        "mask": jnp.ones(shape, bool),
        "resets": jnp.zeros(shape, bool),
    }
    both = jax.jit(jax.grad(lambda p: loss(p, batch, None)[0]))
    clock, times = _clock(), []
    jax.block_until_ready(both(params))
    for _ in range(5):
        start = clock()
        jax.block_until_ready(both(params))
        times.append(clock() - start)
    return statistics.median(times)


def _seconds(update: Callable, grads: Any, state: Any, params: Any, steps: int) -> float:
    """Mean seconds of an update over `steps` of them, after one that compiles."""
    import jax

    _, state = jax.block_until_ready(update(grads, state, params))
    clock = _clock()
    start = clock()
    for _ in range(steps):
        updates, state = update(grads, state, params)
    jax.block_until_ready((updates, state))
    return (clock() - start) / steps
