"""Small models trained from scratch on generated tasks: what several experiments share.

A cell is one model on one task at one learning rate and seed. A finished cell is a file of its own
in OUT/cells, so that an experiment that was stopped goes on where it was, and several processes
with different `--models` or `--tasks` can fill one folder.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestedjax import models, optim, training
from nestedjax.errors import ConfigError, one_line
from nestedjax.run.plots import figure

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
    """

    steps: int
    every: int
    rates: tuple[float, ...] = (3e-3,)
    seeds: tuple[int, ...] = (0, 1, 2)
    warmup: int = 50
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.01

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
    right = jnp.sum((logits.argmax(-1) == batch["targets"]) & asked)
    count = jnp.sum(asked)
    metrics = {"accuracy": right / jnp.maximum(count, 1), "tokens": count}
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


def optimizer(model: models.Model, task: Task, plan: Plan, rate: float):
    """AdamW behind a clip at norm 1; a continuum block with a period is stepped at its period."""

    def adamw(period: int) -> optax.GradientTransformation:
        # The rate is in the state, so that every rate is the same program.
        adam = optax.inject_hyperparams(optax.adamw)(
            learning_rate=rate, b2=0.98, weight_decay=plan.weight_decay
        )
        return optax.chain(adam, optax.scale_by_schedule(optim.at_writes(plan.factor, period)))

    timed = models.optimizer(model, adamw, step_tokens=task.shape[0] * task.shape[1])
    return optax.chain(optax.clip_by_global_norm(1.0), timed)


def fit(config: models.ModelConfig, task: Task, plan: Plan, *, rate: float, seed: int) -> dict:
    """Train one model.

    Returns:
      `parameters`; `seconds` (of the processor; on an accelerator, of the clock); `accuracy`, name
      -> share of right answers after the last step; `curve`, a list of {"step": ..., name:
      accuracy}; `error`, why it stopped, or None.
    """
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    model, began, curve = models.create(config, seed=seed), clock(), []
    definition, weights = models.split(model)

    def loss(weights, batch):
        logits, _ = models.merge(definition, weights)(batch["tokens"])
        return task.loss(logits, batch)

    evaluate = training.make_evaluate(training.stateless(loss))

    def measured(state: training.TrainState, sets: Mapping[str, list[Batch]]) -> dict[str, float]:
        return {name: evaluate(state.params, sets[name])["accuracy"] for name in sets}

    tx = optimizer(model, task, plan, rate)
    row: dict = {"parameters": models.parameter_count(model), "accuracy": {}, "error": None}
    try:
        result = training.train(
            training.stateless(loss),
            jax.jit(lambda weights: training.init_state(weights, tx))(weights),
            tx=tx,
            dataset=Drawn(task, seed),
            config=training.LoopConfig(plan.steps, plan.steps, plan.steps, DISPATCH),
            hooks=[
                training.Hook(
                    plan.every,
                    lambda s: curve.append({"step": int(s.step), **measured(s, task.heldout)}),
                )
            ],
        )
        if result.stopped_by:
            raise SystemExit(f"stopped by {result.stopped_by}; start it again to go on")
        last = {name: curve[-1][name] for name in task.heldout}
        row["accuracy"] = {**last, **measured(result.state, task.final)}
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
    tasks: Mapping[str, Task],
    configs: Callable[[int], Mapping[str, models.ModelConfig]],
    names: Sequence[str],
    *,
    plans: Mapping[str, Plan],
    out: Path,
) -> None:
    """Fill the cells of every task and model: the rates on the first seed, then the other seeds.

    Args:
      tasks: name -> task.
      configs: `configs(vocab) -> {model name: configuration}`.
      names: of the models.
      plans: name of a task -> how it is trained.
      out: folder of the experiment.
    """
    folder = out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    # All rates and seeds of a model are one program.
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    for (task_name, task), name in ((item, n) for item in tasks.items() for n in names):
        config, plan = configs(task.vocab)[name], plans[task_name]
        shared = dataclasses.asdict(plan)
        rates, seeds = shared.pop("rates"), shared.pop("seeds")
        shared |= {"data": task.about, "config": repr(config)}

        def run(rate: float, seed: int, *, parts=(config, task, plan), about=shared, of=None) -> dict:
            head = {"task": of[0], "model": of[1], "learning_rate": rate, "seed": seed}
            row = cell(folder, head | about, lambda: fit(*parts, rate=rate, seed=seed))
            print(f"{of[0]}  {of[1]}  rate {rate:g}  seed {seed}: {outcome(row)}", flush=True)
            return row

        run = functools.partial(run, of=(task_name, name))
        first = [run(rate, seeds[0]) for rate in rates]
        best = max(first, key=score)["learning_rate"]
        for seed in seeds[1:]:
            run(best, seed)


def outcome(row: dict) -> str:
    """One line about a cell."""
    found = ", ".join(f"{name} {value:.3f}" for name, value in row["accuracy"].items())
    return f"{row['error'] or found} ({row['seconds']:.0f} s)"


def passed(row: dict, least: float) -> int | None:
    """The first measured step at which the first held-out accuracy is at least `least`."""
    for entry in row["curve"]:
        if next(v for k, v in entry.items() if k != "step") >= least:
            return entry["step"]
    return None


def collect(out: Path, name: str) -> list[dict]:
    """All finished cells of a folder, also written to its one results file, NAME.json."""
    rows = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def chosen(rows: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    """(task, model) -> the cells of its best learning rate, a seed each."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["task"], row["model"]), []).append(row)
    for key, own in found.items():
        first = [row for row in own if row["seed"] == min(r["seed"] for r in own)]
        rate = max(first, key=score)["learning_rate"]
        found[key] = [row for row in own if row["learning_rate"] == rate]
    return found


def spread(values: Sequence[float]) -> str:
    """Mean (smallest, largest)."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.3f} ({min(values):.3f}, {max(values):.3f})"


def report(rows: Sequence[dict], *, least: float) -> str:
    """A table, one line a task and model; seeds that diverged or never passed are counted out."""
    head = ["task", "model", "parameters", "rate", "seeds", "accuracy, mean (min, max)"]
    lines = [[*head, f"steps to {least:g}", "s a run"]]
    lines.append(["---"] * len(lines[0]))
    for (task, name), own in chosen(rows).items():
        fine = [row for row in own if not row["error"]]
        steps = [passed(row, least) for row in own]
        sets = fine[0]["accuracy"] if fine else {}
        accuracy = [f"{k} {spread([row['accuracy'][k] for row in fine])}" for k in sets]
        seeds = f"{len(own)}" + (f", {len(own) - len(fine)} diverged" if len(fine) < len(own) else "")
        lines.append(
            [task, name, f"{own[0]['parameters']:,}", f"{own[0]['learning_rate']:g}", seeds]
            + ["; ".join(accuracy) or "-", " / ".join(str(s or "never") for s in steps)]
            + [f"{statistics.mean(row['seconds'] for row in own):.0f}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: Sequence[dict], path: Path, *, title: str) -> None:
    """Accuracy against training step: a panel a task, a colour a model, a line a seed."""
    cells = chosen(rows)
    tasks = list(dict.fromkeys(task for task, _ in cells))
    names = list(dict.fromkeys(name for _, name in cells))
    columns = min(len(tasks), 3)
    deep = -(-len(tasks) // columns)
    picture, axes = figure(
        4.2 * columns + 2, 3.2 * deep, rows=deep, columns=columns, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for task, axis in zip(tasks, axes.flat, strict=False):
        for (of, name), own in cells.items():
            for index, row in enumerate(own if of == task else []):
                steps = [entry["step"] for entry in row["curve"]]
                values = [next(v for k, v in e.items() if k != "step") for e in row["curve"]]
                label = name if index == 0 else None
                color = f"C{names.index(name) % 10}"
                style = "-" if names.index(name) < 10 else "--"
                axis.plot(steps, values, style, color=color, linewidth=1.1, label=label)
        axis.set_title(task, loc="left")
        axis.set(xlabel="step", ylim=(-0.02, 1.02))
        axis.grid(True, color="#e8e8e8", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("accuracy, held-out")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= {label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    picture.legend(handles.values(), handles, loc="outside right upper", frameon=False)
    picture.suptitle(title, x=0.01, ha="left")
    picture.savefig(path)


class Parser(argparse.ArgumentParser):
    """Whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def run(
    name: str,
    doc: str,
    *,
    tasks: Mapping[str, Mapping[str, Callable[[], Task]]],
    plans: Mapping[str, Callable[[str], Plan]],
    configs: Callable[[int], Mapping[str, models.ModelConfig]],
    least: float,
    title: str,
    check: Callable[[], None] = lambda: None,
) -> None:
    """The command line of an experiment: fill the cells asked for, then table, results and plot.

    Args:
      name: of the experiment.
      doc: its head.
      tasks: scale -> name -> makes the task.
      plans: scale -> name of a task -> its plan.
      configs: see `compare`.
      least: the accuracy whose first step the table shows.
      title: of the plot.
      check: raises if the experiment cannot run here.
    """
    known = {task: None for of in tasks.values() for task in of}
    parser = Parser(prog=f"python -m experiments.{name}", description=doc.splitlines()[0])
    parser.add_argument("--scale", choices=tasks, default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=known, help="default: all of the scale")
    parser.add_argument("--models", nargs="+", choices=configs(2), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the scale")
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    given = parser.parse_args()
    here = tasks[given.scale]
    for task in given.tasks or ():
        if task not in here:
            parser.error(f"--scale {given.scale} has no task {task}: it has {', '.join(here)}")
    if any(not 0 <= seed < HELDOUT for seed in given.seeds or ()):
        parser.error(f"--seeds {given.seeds}: give seeds from 0 to {HELDOUT - 1}")
    try:
        check()
        asked = {task: plans[given.scale](task) for task in given.tasks or here}
        if given.seeds:
            seeds = tuple(given.seeds)
            asked = {t: dataclasses.replace(plan, seeds=seeds) for t, plan in asked.items()}
        for task, plan in asked.items():
            names = given.models or list(configs(2))
            compare({task: here[task]()}, configs, names, plans={task: plan}, out=given.out)
        rows = collect(given.out, name)
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    draw(rows, given.out / f"{name}.png", title=title)
    print(report(rows, least=least))
