"""Train a model on text, or continue a run: the same command on an existing run folder goes on
where the newest checkpoint left off, and ends as if it had never stopped.

The run folder gets config.json, checkpoints/, metrics.jsonl, tensorboard/ and loss.png; one process
at a time trains in it. Continuing takes its saved settings; only --steps (to more),
--validate-every, --checkpoint-every and --sample-every may change, and the --mesh, which is not
saved. A run that has saved no step yet begins anew. Ctrl-C, SIGTERM and SIGHUP finish the dispatch,
save and exit with 130, 143 and 129; the second Ctrl-C exits at once. Metrics that cannot be written
cost a warning, a checkpoint that cannot be written ends the run with 1.
The last line is: done: step=N val_loss=X.XXXX tokens=N run=DIR (nats per token)"""

import dataclasses
import os
import shlex
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from nestedjax.cli.command import UsageError, parse
from nestedjax.cli.errors import guarded

EXAMPLE = """  nestedjax train hope_nano --run runs/first
  nestedjax train hope_nano --data book.txt --steps 200 --cms.periods 4096 8192 none none
  nestedjax train hope_nano --optimizer m3 --optimizer.period 20 --layers 1 --width 64
  nestedjax train --config runs/first/config.json --seed 1 --run runs/second
"""

PRESETS = """
nestedjax train PRESET --help lists every setting, with its meaning and its value in that preset.
PRESET is one of {}
"""

STOPPED = {"Ctrl-C": 130, "SIGHUP": 129}
SAMPLE = 240  # tokens


def options(
    *,
    run: str | None = None,
    mesh: str | None = None,
    config: str | None = None,
    use: bool = False,
    modules: Annotated[tuple[str, ...], Parameter("--import")] = (),
) -> None:
    """The flags that are no settings.

    Args:
      run: the run folder; by default runs/PRESET.
      mesh: all devices along axes, such as data=2,fsdp=2,tensor=2; none for one device.
      config: the config.json of a run whose settings the new one takes.
      use: at the end, also say what the loss on the held-out text is with nothing written into the
        memories, and with those that generate keys, values and gates frozen; see `nestedjax eval`.
      modules: modules to import, in which models of your own are.
    """


def main(argv: Sequence[str]) -> int:
    """`nestedjax train`; returns the exit code."""
    return guarded("train", lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    from nestedjax import models, run
    from nestedjax.cli import flags

    found = flags.named(argv)
    folder, modules = found.early.get("run"), found.early.get("modules", ())
    if folder is None and found.name is not None:
        folder = os.path.join("runs", found.name)
    saved = None if folder is None else run.load_config(folder, modules)
    if saved is None and found.name is None and "config" not in found.early and _asks(argv):
        example = EXAMPLE + PRESETS.format(", ".join(models.PRESETS))
        parse("nestedjax train PRESET", options, argv, about=__doc__ or "", example=example)
        return 0
    if saved is not None and folder and not run.has_steps(folder):
        saved = None if _names_another(found, saved) else saved
    if saved is not None and "config" in found.early:
        raise UsageError(f"--config begins a new run and {folder} holds one; name another --run")
    config = saved or flags.start(found)
    prog = f"nestedjax train {found.name or config.preset}"
    read = flags.read(prog, options, found, config, about=__doc__ or "", example=EXAMPLE)
    if read is None:
        return 0
    own, changes = read
    if saved is None:
        config = flags.changed(config, changes)
    else:
        config = run.check(run.replaced(saved, changes))
        config = dataclasses.replace(config, preset=found.name or saved.preset)
    return _train(config, folder or os.path.join("runs", config.preset), own)


def _names_another(found: Any, saved: Any) -> bool:
    """Whether the arguments say where to begin, and it is not the run in the folder."""
    return "config" in found.early or found.name not in (None, saved.preset)


def _asks(argv: Sequence[str]) -> bool:
    return bool({"--help", "-h"} & {*argv})


def _train(config: Any, folder: str, own: dict[str, Any]) -> int:
    """Train, show how it goes, and say how it ended; returns the exit code."""
    from nestedjax import models, run
    from nestedjax.cli.output import say
    from nestedjax.cli.printing import printable
    from nestedjax.cli.progress import Progress
    from nestedjax.sharding import make_mesh

    mesh = None if own.get("mesh") is None else make_mesh(own["mesh"])
    with Progress(folder) as progress:
        result = run.train(config, folder, mesh=mesh, on_event=progress)
    step = result.trained.step
    if result.stopped_by is not None:
        preset = [config.preset] if config.preset in models.PRESETS else []
        modules = ["--import", *own["modules"]] if "modules" in own else []
        again = ["nestedjax", "train", *preset, "--run", folder, *modules]
        say(
            f"stopped by {result.stopped_by} at step {step}, saved; continue with:"
            f" {shlex.join(again)}"
        )
        return STOPPED.get(result.stopped_by, 143)
    say(printable(run.generate(result.trained, tokens=SAMPLE, seed=config.seed)))
    say("" if (curve := _plot(folder, config.preset)) is None else f"\nloss curve: {curve}")
    if own.get("use"):
        _say_use(result.trained)
    say(f"metrics: {folder}/metrics.jsonl, {folder}/tensorboard")
    say(f"checkpoints: {folder}/checkpoints")
    loss = result.record.get("val_loss", float("nan"))
    tokens = config.loop.steps * config.step_tokens
    say(f"done: step={config.loop.steps} val_loss={loss:.4f} tokens={tokens} run={folder}")
    return 0


SWITCHED = {
    ("memories", "not_written"): "with nothing written",
    ("projections", "frozen"): "with the projections frozen",
}


def _say_use(trained: Any) -> None:
    """What the memories were worth on the held-out text."""
    from nestedjax import models, run
    from nestedjax.cli.output import say

    try:
        pairs = [pair for pair in SWITCHED if pair in models.switches(trained.model)]
        if not pairs:
            say("memories: this model has none that are written in context")
            return
        found = run.evaluate(trained, use=pairs)
    except (ValueError, OSError) as error:  # the run itself is whole
        say(f"memories: not measured ({error})")
        return
    said = []
    for row in found.use:
        cost = f"{row.delta:+.4f} +- {row.standard_error:.4f}"
        said.append(f"{SWITCHED[row.name, row.switch]} {row.loss:.4f} ({cost})")
    title = f"memories: loss of the validation and test text {found.unswitched:.4f}"
    say("\n  ".join([title, *said]))


def _plot(folder: str, title: str) -> str | None:
    """Draw the loss curve; a picture that cannot be drawn costs a warning."""
    from nestedjax.errors import ConfigError, RunWarning
    from nestedjax.run.plots import plot_losses

    curve = os.path.join(folder, "loss.png")
    try:
        plot_losses(folder, curve, title=title)
    except (OSError, ConfigError) as error:
        why = getattr(error, "strerror", None) or error
        warnings.warn(f"no loss curve in {curve} ({why})", RunWarning, stacklevel=2)
        return None
    return curve
