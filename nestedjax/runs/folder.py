"""A run's folder: `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `loss.png`."""

import json
import os
from typing import NamedTuple

from etils import epath

from nestedjax import configs, models
from nestedjax.checkpoint import CheckpointError, Checkpoints
from nestedjax.configs import RunConfig
from nestedjax.data import Vocabulary
from nestedjax.overrides import ConfigError, one_line
from nestedjax.runs.assemble import abstract_model, abstract_state, vocabulary_of


class Model(NamedTuple):
    """A trained model out of a run folder.

    Attributes:
      config: of its run.
      step: updates it has seen.
      model: with the weights of that step.
      vocabulary: its tokens.
    """

    config: RunConfig
    step: int
    model: models.Model
    vocabulary: Vocabulary


def save_config(folder: str | os.PathLike, config: RunConfig) -> None:
    """Write `config.json` in one atomic replacement; the folder is made if missing.

    Raises:
      ConfigError: the folder cannot be written.
    """
    path = epath.Path(folder) / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / "config.json.tmp"
        temporary.write_text(json.dumps(configs.to_json(config), indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write the run folder {os.fspath(folder)} ({error.strerror or error}); "
            "give another one with --run"
        ) from error


def load_config(folder: str | os.PathLike) -> RunConfig | None:
    """The configuration of a run folder, or None if there is no run in it.

    Raises:
      ConfigError: `config.json` cannot be read.
    """
    path = epath.Path(folder) / "config.json"
    try:
        if not path.exists():
            return None
        return configs.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"{path} is no run configuration ({one_line(error)}); restore it, or use a new folder"
        ) from error


def require_config(folder: str | os.PathLike) -> RunConfig:
    """The configuration of a run folder.

    Raises:
      ConfigError: there is no run in it, or `config.json` cannot be read.
    """
    config = load_config(folder)
    if config is None:
        raise ConfigError(
            f"no run in {os.fspath(folder)}; make one with nestedjax train PRESET --run DIR"
        )
    return config


def load(folder: str | os.PathLike) -> Model:
    """The newest whole model of a run folder, on one device.

    Raises:
      ConfigError: it is no run folder, or nothing is saved in it yet.
      CheckpointError: nothing in it is whole.
    """
    config = require_config(folder)
    like = abstract_state(config)
    checkpoints = epath.Path(folder) / "checkpoints"
    restored = None
    if checkpoints.exists():
        with Checkpoints(checkpoints) as found:
            restored = found.restore(like)
    if restored is None:
        raise CheckpointError(f"no checkpoint in {os.fspath(folder)} yet; train it first")
    definition, _ = models.split(abstract_model(config))
    model = models.merge(definition, restored.state.params)
    return Model(config, restored.step, model, vocabulary_of(config))
