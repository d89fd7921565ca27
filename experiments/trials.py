"""Small models trained from scratch on generated tasks: what several experiments share.

A cell is one model on one task at one learning rate and seed. A finished cell is a file of its own
in OUT/cells, so that an experiment that was stopped goes on where it was, and several processes
with different `--models` or `--tasks` can fill one folder.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestedjax import models, optim, training
from nestedjax.errors import ConfigError, one_line

Batch = dict[str, np.ndarray]
HELDOUT = 10**6  # seeds of runs are smaller
DISPATCH = 25  # steps in one call


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model is trained and measured on.

    Attributes:
      about: everything that its data depend on, in one line.
      vocab: tokens.
      shape: rows and tokens of a training batch.
      draw: the training batch of a random generator; `tokens` [B, T] and what `loss` needs.
      loss: `loss(logits, batch) -> (loss, {"accuracy": ..., "tokens": what it is the mean over})`.
      heldout: name -> batches measured during training; the learning rate is chosen by the first.
      final: name -> batches measured once, after the last step.
    """

    about: str
    vocab: int
    shape: tuple[int, int]
    draw: Callable[[np.random.Generator], Batch]
    loss: Callable[[jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    heldout: Mapping[str, list[Batch]]
    final: Mapping[str, list[Batch]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How every model is trained: plain AdamW, the same for all of them.

    Attributes:
      steps: of a run.
      every: steps between two measurements.
      rates: peak learning rates; the best on the first seed is the one of all seeds.
      seeds: of weights and of training batches.
      warmup: steps of a linear rise from zero.
      schedule: after the warm-up, "constant" or "cosine" (to a fortieth of the peak).
      weight_decay: of every weight.
      until: a run ends at the first measurement whose first accuracy is at least this; None for
        all steps.
    """

    steps: int
    every: int
    rates: tuple[float, ...] = (3e-3,)
    seeds: tuple[int, ...] = (0, 1, 2)
    warmup: int = 50
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.01
    until: float | None = None

    def factor(self, step: Any) -> Any:
        """What the peak learning rate is multiplied with."""
        if self.schedule == "cosine":
            steps = max(self.steps, self.warmup + 1)
            return optax.warmup_cosine_decay_schedule(0.0, 1.0, self.warmup, steps, 1 / 40)(step)
        return optax.warmup_constant_schedule(0.0, 1.0, self.warmup)(step)


def answers(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of `targets`, each times its `weights`; accuracy where `asked` is true."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    asked = batch["asked"]
    right = jnp.sum((logits.argmax(-1) == batch["targets"]) & asked, dtype=jnp.float32)
    count = jnp.sum(asked, dtype=jnp.float32)
    metrics = {"accuracy": right / jnp.maximum(count, 1.0), "tokens": count}
    return jnp.sum(losses * batch["weights"]), metrics


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The batches of one seed: step s is drawn from (seed, s)."""

    task: Task
    seed: int

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on."""
        return {"task": self.task.about, "seed": self.seed}

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step."""
        return self.task.draw(np.random.default_rng((self.seed, step)))

    def iterate(self, start: int) -> Iterator[Batch]:
        """Batches from a step on, without an end."""
        return (self[step] for step in range(start, 2**31))


def heldout(draw: Callable[[np.random.Generator], Batch], count: int) -> list[Batch]:
    """Batches that no run is trained on, the same for all."""
    return [draw(np.random.default_rng((HELDOUT, index))) for index in range(count)]


class Solved(Exception):
    """A run is over before its last step; `state` is its last one."""

    def __init__(self, state: training.TrainState):
        super().__init__("solved")
        self.state = state


class Peak(NamedTuple):
    """The peak learning rate as a state, so that every rate is the same program."""

    rate: jax.Array  # shape=()


def peak(rate: float) -> optax.GradientTransformation:
    """Updates times a rate."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: u * state.rate, updates), state

    return optax.GradientTransformation(lambda params: Peak(jnp.float32(rate)), update)


def optimizer(model: models.Model, task: Task, plan: Plan, rate: float):
    """AdamW behind a clip at norm 1; a continuum block with a period is stepped at its period."""

    def adamw(period: int) -> optax.GradientTransformation:
        return optax.chain(
            optax.adamw(1.0, b2=0.98, weight_decay=plan.weight_decay),
            peak(rate),
            optax.scale_by_schedule(optim.at_writes(plan.factor, period)),
        )

    timed = models.optimizer(model, adamw, step_tokens=task.shape[0] * task.shape[1])
    return optax.chain(optax.clip_by_global_norm(1.0), timed)


def fit(config: models.ModelConfig, task: Task, plan: Plan, *, rate: float, seed: int) -> dict:
    """Train one model.

    Returns:
      `parameters`; `seconds` (of the processor; on an accelerator, of the clock); `accuracy`, name
      -> share of right answers after the last step that was done; `curve`, a list of
      {"step": ..., name: accuracy}; `error`, why it stopped, or None.
    """
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    model, began, curve = models.create(config, seed=seed), clock(), []
    definition, weights = models.split(model)

    def loss(weights, batch):
        logits, _ = models.merge(definition, weights)(batch["tokens"])
        return task.loss(logits, batch)

    evaluate = training.make_evaluate(training.stateless(loss))

    def measured(state: training.TrainState, sets: Mapping[str, list[Batch]]) -> dict[str, float]:
        return {name: float(evaluate(state.params, sets[name])["accuracy"]) for name in sets}

    def measure(state: training.TrainState) -> None:
        curve.append({"step": int(state.step), **measured(state, task.heldout)})
        if plan.until is not None and curve[-1][next(iter(task.heldout))] >= plan.until:
            raise Solved(state)

    tx = optimizer(model, task, plan, rate)
    row: dict = {"parameters": models.parameter_count(model), "accuracy": {}, "error": None}
    try:
        try:
            result = training.train(
                training.stateless(loss),
                jax.jit(lambda weights: training.init_state(weights, tx))(weights),
                tx=tx,
                dataset=Drawn(task, seed),
                config=training.LoopConfig(plan.steps, plan.steps, plan.steps, DISPATCH),
                hooks=[training.Hook(plan.every, measure)],
            )
            if result.stopped_by:
                raise SystemExit(f"stopped by {result.stopped_by}; start it again to go on")
            state = result.state
        except Solved as solved:
            state = solved.state
        last = {name: curve[-1][name] for name in task.heldout}
        row["accuracy"] = {**last, **measured(state, task.final)}
    except training.TrainingError as error:
        row["error"] = one_line(error)
    return row | {"seconds": round(clock() - began, 1), "curve": curve}


def cell(folder: Path, about: dict[str, Any], work: Callable[[], dict]) -> dict:
    """What `work` found, read from the folder if it has been done.

    Args:
      folder: of the cells.
      about: the settings of the cell; `task`, `model`, `learning_rate` and `seed` name its file.
      work: does it.

    Raises:
      ConfigError: the file is of other settings.
    """
    name = f"{about['task']}-{about['model']}-{about['learning_rate']:g}-{about['seed']}.json"
    path = folder / name
    if path.exists():
        found = json.loads(path.read_text())
        other = [key for key in about if found.get(key) != about[key]]
        if other:
            raise ConfigError(f"{path} is of another {' and '.join(other)}: give another --out")
        return found
    found = about | work()
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found) + "\n")
    temporary.replace(path)
    return found


def score(row: dict) -> float:
    """The accuracy that a learning rate is chosen by; a run that diverged has none."""
    return next(iter(row["accuracy"].values()), -1.0)


def compare(
    task_name: str,
    task: Task,
    configs: Mapping[str, models.ModelConfig],
    *,
    plan: Plan,
    folder: Path,
) -> list[dict]:
    """Fill the cells of a task: of every model the rates on the first seed, then the other seeds.

    Args:
      task_name: of the task.
      task: what is learned.
      configs: model name -> configuration.
      plan: how each is trained.
      folder: of the cells.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = dataclasses.asdict(plan) | {"data": task.about}
    rates, seeds = shared.pop("rates"), shared.pop("seeds")
    rows = []

    def trial(name: str, rate: float, seed: int) -> dict:
        config = configs[name]
        head = {"task": task_name, "model": name, "learning_rate": rate, "seed": seed}
        about = head | shared | {"config": repr(config)}
        row = cell(folder, about, lambda: fit(config, task, plan, rate=rate, seed=seed))
        print(f"{task_name}  {name}  rate {rate:g}  seed {seed}: {outcome(row)}", flush=True)
        rows.append(row)
        return row

    for name in configs:
        best = max((trial(name, rate, seeds[0]) for rate in rates), key=score)
        for seed in seeds[1:]:
            trial(name, best["learning_rate"], seed)
    return rows


def outcome(row: dict) -> str:
    """One line about a cell."""
    found = ", ".join(f"{name} {value:.3f}" for name, value in row["accuracy"].items())
    return f"{row['error'] or found} ({row['seconds']:.0f} s)"
