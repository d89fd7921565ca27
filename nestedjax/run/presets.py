"""The run that a preset of a model stands for, and how it is changed."""

from collections.abc import Mapping
from typing import Any

from nestedjax import models
from nestedjax.errors import ConfigError, near, shown
from nestedjax.run.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, check
from nestedjax.run.data import tokenizer_of
from nestedjax.run.saved import type_name
from nestedjax.run.settings import replaced, settings
from nestedjax.training import LoopConfig


def run_preset(
    preset: str | ModelConfig | RunConfig,
    changes: Mapping[str, Any] | None = None,
    /,
    **run: Any,
) -> RunConfig:
    """The run of a preset, or of a model's configuration, with settings changed.

    `settings(run)` lists all of them. Given `files` or a `tokenizer`, a preset's vocabulary has the
    size of the tokenizer (256 for bytes), unless `changes` has a `vocab`.

    Args:
      preset: of a model, such as "hope_nano"; or a model configuration of any class, which gets the
        run that `RunConfig` makes by default; or another run.
      changes: settings of the model, by their paths: {"memory.chunk_size": 16, "layers": 1}.
      **run: settings of the run: steps, batch, length, files, tokenizer, learning_rate, warmup,
        seed, validate_every, checkpoint_every ...; `optimizer="m3"`, or with arguments
        `optimizer={"name": "m3", "period": 5}`.

    Raises:
      ConfigError: an unknown preset or setting, with the near ones; a value of another type; or
        settings that do not fit each other.

    Example:
      >>> import nestedjax as nj
      >>> run = nj.run_preset("hope_nano", {"memory.chunk_size": 16}, steps=20, batch=4)
      >>> run.model.memory.chunk_size, run.loop.steps, run.step_tokens
      (16, 20, 1024)
    """
    config = _start(preset)
    if not isinstance(changes, Mapping | None):
        raise ConfigError(
            f"changes={shown(changes)} must be a mapping, such as {{'layers': 1}}; settings of the"
            " run are keywords, such as steps=20"
        )
    changes = dict(changes or {})
    known = settings(config)
    for names, of_model in ((changes, True), (run, False)):
        for name in names:
            if name in known and (known[name].path[0] == "model") != of_model:
                raise ConfigError(
                    f"{name} is a setting of the run: give it as {name}=..."
                    if of_model
                    else f"{name} is a setting of the model: give it as {{{name!r}: ...}}"
                )
    follows = isinstance(preset, str) and ("files" in run or "tokenizer" in run)
    if isinstance(preset, RunConfig) and "tokenizer" in run:
        follows = preset.model.vocab == tokenizer_of(preset).size
    config = replaced(config, run)
    if follows:
        changes.setdefault("vocab", tokenizer_of(config).size)
    return check(replaced(config, changes))


def _start(preset: str | ModelConfig | RunConfig) -> RunConfig:
    if isinstance(preset, RunConfig):
        return preset
    if not isinstance(preset, str):
        if not isinstance(preset, models.ModelConfig):
            raise ConfigError(f"{preset!r} is neither a preset's name nor a model's configuration")
        return RunConfig(preset=type_name(preset), model=preset)
    if preset not in models.PRESETS:
        raise ConfigError(f"no preset {preset!r}; {near(preset, models.PRESETS)}")
    size = next((part for part in preset.split("_") if part in SIZES), None)
    run = RunConfig(preset=preset, model=models.PRESETS[preset], **SIZES.get(size, {}))
    return replaced(run, models.PRESETS.run(preset))


def _size(
    steps: int,
    *,
    length: int,
    batch: int,
    learning_rate: float,
    every: int,
    dispatch: int = 1,
    **optimizer: Any,
) -> dict[str, Any]:
    """Data, optimizer and loop shared by all models of one size."""
    optimizer = {"learning_rate": learning_rate, "warmup": max(steps // 20, 1), **optimizer}
    return {
        "data": DataConfig(
            length=length, batch=batch, validation_batches=None if length < 512 else 50
        ),
        "optimizer": OptimizerConfig(**optimizer),
        "loop": LoopConfig(steps, every, every, steps_per_dispatch=dispatch),
        "sample_every": None if steps < 1_000 else every * 2,
    }


# The large ones take half a million tokens a step (spec G1).
SIZES: dict[str | None, dict[str, Any]] = {
    "nano": _size(
        800,
        length=256,
        batch=8,
        learning_rate=4e-3,
        every=100,
        dispatch=5,
        name="m3",
        warmup=50,
        final_fraction=0.05,
    ),
    "micro": _size(5_000, length=1024, batch=8, learning_rate=2e-3, every=250),
    "mini": _size(20_000, length=2048, batch=8, learning_rate=1e-3, every=500),
    "340m": _size(28_600, length=4096, batch=128, learning_rate=3e-4, every=500),
    "760m": _size(57_200, length=4096, batch=128, learning_rate=2.5e-4, every=500),
    "1p3b": _size(190_700, length=4096, batch=128, learning_rate=2e-4, every=1000),
}
