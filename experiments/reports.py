"""The table, the plot and the command line of the experiments that are made of trials."""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.trials import HELDOUT, Plan, Task, compare, score
from nestedjax import models
from nestedjax.errors import one_line
from nestedjax.run.plots import figure


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
        seeds = f"{len(own)}" + (
            f", {len(own) - len(fine)} diverged" if len(fine) < len(own) else ""
        )
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
        4.2 * columns + 2.8, 3.6 * deep, rows=deep, columns=columns, sharey=True, squeeze=False
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
                style = ("-", "--", ":")[names.index(name) // 10 % 3]
                axis.plot(steps, values, style, color=color, linewidth=1.1, label=label)
        axis.set_title(task, loc="left")
        axis.set(xlabel="step", ylim=(-0.02, 1.02))
        axis.grid(True, color="#e8e8e8", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("accuracy, held-out")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= {
            label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
    picture.legend(handles.values(), handles, loc="outside right center", frameon=False)
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
    tasks: Mapping[str, Mapping[str, Callable[..., Task]]],
    plans: Mapping[str, Callable[[str], Plan]],
    configs: Callable[[Task], Mapping[str, models.ModelConfig]],
    names: Sequence[str],
    least: float,
    title: str,
    data: Path | None = None,
) -> None:
    """The command line of an experiment: fill the cells asked for, then table, results and plot.

    Args:
      name: of the experiment.
      doc: its head.
      tasks: scale -> name -> makes the task.
      plans: scale -> name of a task -> its plan.
      configs: of a task, model name -> configuration.
      names: of the models.
      least: the accuracy whose first step the table shows.
      title: of the plot.
      data: the folder that the tasks read unless another is given; None if they read none.
    """
    known = {task: None for of in tasks.values() for task in of}
    parser = Parser(prog=f"python -m experiments.{name}", description=doc.splitlines()[0])
    parser.add_argument("--scale", choices=tasks, default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=known, help="default: all of the scale")
    parser.add_argument("--models", nargs="+", choices=names, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the scale")
    parser.add_argument("--rates", nargs="+", type=float, help="default: those of the scale")
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    if data:
        parser.add_argument("--data", type=Path, default=data, help="folder of the data")
    given = parser.parse_args()
    here = tasks[given.scale]
    for task in given.tasks or ():
        if task not in here:
            parser.error(f"--scale {given.scale} has no task {task}: it has {', '.join(here)}")
    if any(not 0 <= seed < HELDOUT for seed in given.seeds or ()):
        parser.error(f"--seeds {given.seeds}: give seeds from 0 to {HELDOUT - 1}")
    if any(not 0 < rate <= 1 for rate in given.rates or ()):
        parser.error(f"--rates {given.rates}: give learning rates above 0, at most 1")
    # All rates and seeds of a model are one program.
    jax.config.update("jax_compilation_cache_dir", str(given.out / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        asked = {task: plans[given.scale](task) for task in given.tasks or here}
        changed = {"seeds": given.seeds, "rates": given.rates}
        changed = {name: tuple(values) for name, values in changed.items() if values}
        asked = {t: dataclasses.replace(plan, **changed) for t, plan in asked.items()}
        for name_of, plan in asked.items():
            task = here[name_of](**({"data": given.data} if data else {}))
            table = configs(task)
            table = {model: table[model] for model in given.models or table}
            compare(name_of, task, table, plan=plan, folder=given.out / "cells")
        rows = collect(given.out, name)
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    draw(rows, given.out / f"{name}.png", title=title)
    print(report(rows, least=least))
