"""What `nestedjax train` does between its arguments and its last line."""

from collections.abc import Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from nestedjax import overrides, run
from nestedjax.cli.printing import printable
from nestedjax.cli.progress import Progress
from nestedjax.errors import ConfigError, near
from nestedjax.run import Result, RunConfig
from nestedjax.training import plot_losses

SAMPLE = 240  # tokens


def assigned(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """The run with settings changed, as by `--set key=value`."""
    for assignment in sorted(assignments, key=lambda text: not text.startswith("optimizer=")):
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment} has no value; write --set {key}=VALUE")
        known = run.settings(config)
        if key not in known and not key.startswith("optimizer."):
            raise ConfigError(f"unknown setting {key!r}; {near(key, known)}")
        value: Any = text
        if key in known and key != "optimizer":
            value = overrides.parse(known[key].kind, text, key)
        config = run.replaced(config, {key: value})
    return config


def new_run(
    preset: str, assignments: Sequence[str], files: Sequence[str], tokenizer: str | None
) -> RunConfig:
    """The configuration of a new run.

    Raises:
      ConfigError: an unknown preset or setting, or settings that do not fit each other.
    """
    config = run.run_preset(preset, files=files, tokenizer=tokenizer)
    return run.check(assigned(config, assignments))


def continued(
    saved: RunConfig,
    preset: str,
    assignments: Sequence[str],
    files: Sequence[str],
    tokenizer: str | None,
) -> RunConfig:
    """The configuration of a run that goes on: the saved one, with what is given changed."""
    given: dict[str, Any] = {"files": files} if files else {}
    given |= {} if tokenizer is None else {"tokenizer": tokenizer}
    config = run.replaced(assigned(saved, assignments), given)
    return run.check(config.__class__(**{**vars(config), "preset": preset}))


def train(config: RunConfig, folder: str, mesh: Mesh | None = None) -> Result:
    """Train a run in its folder and show how it goes."""
    with Progress(folder) as progress:
        result = run.train(config, folder, mesh=mesh, on_event=progress)
    if result.stopped_by is None:
        path = epath.Path(folder)
        print(printable(run.generate(result.trained, tokens=SAMPLE, seed=config.seed)))
        plot_losses(folder, path / "loss.png", title=config.preset)
        print(f"\nloss curve: {path / 'loss.png'}")
        print(f"metrics: {path / 'metrics.jsonl'}, {path / 'tensorboard'}")
        print(f"checkpoints: {path / 'checkpoints'}")
    return result
