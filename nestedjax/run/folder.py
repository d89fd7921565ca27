"""A run's folder: `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `loss.png`."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress

from etils import epath

from nestedjax.errors import ConfigError, one_line, shown
from nestedjax.run.config import RunConfig
from nestedjax.run.saved import from_json, to_json
from nestedjax.run.settings import changed

# What is left of a process that was killed before its first step.
_LEFT = ("config.json.tmp", "lock", "checkpoints")
_FIX = "leave it out to continue this run, or take a new run folder"


def save_config(folder: str | os.PathLike, config: RunConfig) -> None:
    """Write `config.json` in one atomic replacement; the folder is made if missing.

    Raises:
      ConfigError: the folder cannot be written.
    """
    path = epath.Path(folder) / "config.json"
    temporary = path.parent / "config.json.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(to_json(config), indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot write the run folder {os.fspath(folder)} ({error.strerror or error}); make"
            " room, fix the permissions, or take another one"
        ) from error


def read_config(path: str | os.PathLike, modules: Sequence[str] = ()) -> RunConfig:
    """The run in a `config.json`.

    Args:
      path: of the file.
      modules: see `from_json`.

    Raises:
      ConfigError: it cannot be read.
    """
    try:
        text = epath.Path(path).read_text()
        if not text.strip():
            raise ValueError("it is empty")
        return from_json(json.loads(text), modules)
    except ConfigError as error:
        raise ConfigError(f"{os.fspath(path)}: {one_line(error)}") from error
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(
            f"{os.fspath(path)} is no run configuration ({one_line(error)}); restore it, or use a"
            " new folder"
        ) from error


def load_config(folder: str | os.PathLike, modules: Sequence[str] = ()) -> RunConfig | None:
    """The configuration of a run folder, or None if there is no run in it.

    Raises:
      ConfigError: `config.json` cannot be read.
    """
    if not isinstance(folder, str | os.PathLike):
        raise ConfigError(f"folder is {shown(folder)}; give the path of a run folder")
    path = epath.Path(folder) / "config.json"
    try:
        found = path.exists()
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror or error})") from error
    return read_config(path, modules) if found else None


def require_config(folder: str | os.PathLike, modules: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run folder.

    Raises:
      ConfigError: there is no run in it, or `config.json` cannot be read.
    """
    config = load_config(folder, modules)
    if config is None:
        raise ConfigError(
            f"no run in {os.fspath(folder) or repr('')};"
            " make one with nestedjax train PRESET --run DIR"
        )
    return config


def saved_run(folder: str | os.PathLike, config: RunConfig) -> RunConfig | None:
    """The run that `config` continues in a folder; None if it begins there.

    A run that has saved no step yet may be begun again as any other: nothing is lost.

    Raises:
      ConfigError: the folder holds something else, or another run.
    """
    saved = load_config(folder)
    if saved is None:
        require_free(folder)
    elif has_steps(folder):
        require_same(saved, config)
        return saved
    return None


def has_steps(folder: str | os.PathLike) -> bool:
    """Whether a run has saved a step."""
    path = epath.Path(folder) / "checkpoints"
    return path.is_dir() and any(p.name.isdigit() for p in path.iterdir())


def require_free(folder: str | os.PathLike) -> None:
    """Refuse to begin a run among other files.

    Raises:
      ConfigError: the folder is a file, holds something that is no run, or cannot be read.
    """
    path, name = epath.Path(folder), os.fspath(folder)
    try:
        if not path.exists():
            return
        if not path.is_dir():
            raise ConfigError(f"{name} is a file, not a run folder; take another one")
        others = [p.name for p in path.iterdir() if p.name not in _LEFT]
    except OSError as error:
        raise ConfigError(
            f"cannot read {name} ({error.strerror or error}); take another run folder"
        ) from error
    others += ["checkpoints"] if has_steps(folder) else []
    if others:
        raise ConfigError(f"{name} holds {others[0]} but no run; take an empty or new folder")


def remove_empty(folder: str | os.PathLike) -> None:
    """Remove what was made for a run that could not begin, or whose folder is gone.

    That is halves of checkpoints and empty folders, never a file of anybody else.
    """
    path = epath.Path(folder)
    if "://" in os.fspath(folder) or (path / "config.json").exists():
        return
    for half in (path / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        half.rmtree(missing_ok=True)
    for empty in (path / "checkpoints", path):
        with suppress(OSError):
            os.rmdir(empty)


def require_same(saved: RunConfig, config: RunConfig) -> None:
    """Refuse to continue a run as another one.

    Args:
      saved: the run in the folder.
      config: the run that is asked for.

    Raises:
      ConfigError: something that matters to what a run computes is not what it was.
    """
    if config.preset != saved.preset:
        raise ConfigError(f"this run folder holds a {saved.preset}, not a {config.preset}; {_FIX}")
    for key, (old, new) in changed(saved, config).items():
        raise ConfigError(f"{key} was {old} when this run began, and cannot become {new}; {_FIX}")
    if config.loop.steps < saved.loop.steps:
        raise ConfigError(
            f"steps={config.loop.steps} is less than the run's {saved.loop.steps}; steps may only "
            "grow: leave it out to continue this run"
        )
    if config.given != saved.given:
        was = " and ".join(saved.given) or "neither data nor a loss"
        raise ConfigError(f"this run was trained with {was} given in Python; give the same again")
