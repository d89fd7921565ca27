"""Configurations of runs: frozen dataclasses, a preset for every model preset, and `--set`.

A run is a model (`nestedjax.models.PRESETS`), data, an optimizer and a loop. Its settings are named
flat (`steps`, `length`, `learning_rate`), those of the model by their path in the model's
configuration (`layers`, `memory.chunk_size`, `cms.periods`). `optimizer=m3` chooses the optimizer,
`optimizer.period=20` sets one of its arguments.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from nestedjax import models, overrides
from nestedjax.models.build import BLOCKS
from nestedjax.optim import menu
from nestedjax.overrides import ConfigError, at_least
from nestedjax.training import LoopConfig

ModelConfig = Any  # one of MODELS
MODELS = {kind.__name__: kind for kind in BLOCKS}

# Settings of a run that may change when it continues: they decide when it looks, not what it does.
CHANGEABLE = ("steps", "validate_every", "checkpoint_every", "sample_every")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text of a run, and how a batch is cut out of it.

    Attributes:
      files: text files and folders; none for the text that ships with the package.
      vocabulary: a SentencePiece `.model` file; None for bytes.
      length: tokens of a row.
      batch: rows of a step.
      order: "shuffled" contexts, or "contiguous" text, where row i goes on with row i of the step
        before.
      context_rows: rows of a context; its state is carried from row to row, without gradient. None:
        one row if shuffled, the whole document if contiguous.
      validation_batches: batches of a validation pass; None for the whole validation split.
    """

    files: tuple[str, ...] = ()
    vocabulary: str | None = None
    length: int = 256
    batch: int = 16
    order: Literal["shuffled", "contiguous"] = "shuffled"
    context_rows: int | None = None
    validation_batches: int | None = None

    def __post_init__(self):
        for name in ("length", "batch", "context_rows", "validation_batches"):
            at_least(name, getattr(self, name), 1)

    @property
    def carries(self) -> bool:
        """Whether a context goes on from one step to the next."""
        rows = self.context_rows
        return self.order == "contiguous" if rows is None else rows > 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The outer optimizer, each block of the continuum memory at its own period.

    Attributes:
      name: one of `nestedjax.optim.menu.OPTIMIZERS`; `--set optimizer=NAME`.
      arguments: its arguments in name and value; `--set optimizer.ARGUMENT=VALUE`.
      learning_rate: the highest, after the warm-up.
      warmup: steps.
      final_fraction: of the learning rate, at the last step.
      weight_decay: decoupled; of projections and embedding.
      clip: the largest global norm of a gradient; None does not clip.
      b1: decay of the first moment of the AdamW for what another optimizer leaves to it.
      b2: decay of its second moment.
    """

    learning_rate: float = 1e-3
    warmup: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    clip: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.95
    name: str = "adamw"
    arguments: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        _check_optimizer(self)
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} must be positive; try 0.001")
        at_least("warmup", self.warmup, 0)
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"clip={self.clip} must be positive; give none not to clip")


def _check_optimizer(config: OptimizerConfig) -> None:
    """Refuse a name or arguments that do not exist, and moments that nothing would use."""
    try:
        menu.make(config.name, 1e-3, given=dict(config.arguments))
    except ValueError as error:
        raise ConfigError(f"optimizer={config.name}: {error}") from error
    if not menu.has_rest(config.name):
        for moment, usual in (("b1", 0.9), ("b2", 0.95)):
            if getattr(config, moment) != usual:
                known = moment in menu.arguments(config.name)
                raise ConfigError(
                    f"{config.name} leaves no parameters to another AdamW, so that {moment} would"
                    f" do nothing; {'set optimizer.' if known else 'leave out '}{moment}"
                )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
      preset: where it started from.
      model: a configuration that `models.build` takes.
      data: the text.
      optimizer: the outer optimizer.
      loop: its length and intervals, in steps.
      seed: of weights, data order and samples.
      sample_every: steps between two printed samples; None for one at the end only.
    """

    preset: str
    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig(steps=1000)
    seed: int = 0
    sample_every: int | None = None

    def __post_init__(self):
        at_least("seed", self.seed, 0)
        at_least("sample_every", self.sample_every, 1)

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimizer step."""
        return self.data.batch * self.data.length


def run_preset(name: str) -> RunConfig:
    """The run that `nestedjax train NAME` makes.

    Args:
      name: of a model preset, such as `hope_nano`.

    Raises:
      ConfigError: there is none of that name.

    Example:
      >>> from nestedjax.configs import run_preset
      >>> run_preset("transformer_nano").data.length
      256
    """
    if name not in models.PRESETS:
        raise ConfigError(f"no preset {name!r}; {overrides.near(name, models.PRESETS)}")
    size = next(part for part in name.split("_") if part in SIZES)
    run = RunConfig(preset=name, model=models.PRESETS[name], **SIZES[size])
    data = dataclasses.replace(run.data, **DATA.get(name, {}))
    return dataclasses.replace(run, data=data)


def _size(
    steps: int,
    *,
    length: int,
    batch: int,
    rate: float,
    every: int,
    dispatch: int = 1,
    **optimizer: Any,
) -> dict[str, Any]:
    """Data, optimizer and loop shared by all models of one size."""
    optimizer = {"learning_rate": rate, "warmup": max(steps // 20, 1), **optimizer}
    return {
        "data": DataConfig(
            length=length, batch=batch, validation_batches=None if length < 512 else 50
        ),
        "optimizer": OptimizerConfig(**optimizer),
        "loop": LoopConfig(steps, every, every, steps_per_dispatch=dispatch),
        "sample_every": None if steps < 1_000 else every * 2,
    }


# The large ones take half a million tokens a step (spec G1).
SIZES = {
    "nano": _size(
        800,
        length=256,
        batch=8,
        rate=4e-3,
        every=100,
        dispatch=5,
        name="m3",
        warmup=50,
        final_fraction=0.05,
    ),
    "micro": _size(5_000, length=1024, batch=8, rate=2e-3, every=250),
    "mini": _size(20_000, length=2048, batch=8, rate=1e-3, every=500),
    "340m": _size(28_600, length=4096, batch=128, rate=3e-4, every=500),
    "760m": _size(57_200, length=4096, batch=128, rate=2.5e-4, every=500),
    "1p3b": _size(190_700, length=4096, batch=128, rate=2e-4, every=1000),
}


# Contexts of 1,024 bytes in rows of 256: so its memories stay useful in a text of any length.
DATA: dict[str, dict[str, Any]] = {"hope_nano": {"context_rows": 4}}


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting of a run by the name that `--set` knows it by.

    Example:
      >>> from nestedjax.configs import flat, run_preset
      >>> flat(run_preset("hope_nano"))["memory.heads"]
      4
    """
    found = {}
    for path, value in overrides.settings(config).items():
        group, _, rest = path.partition(".")
        if path == "optimizer.name":
            found["optimizer"] = value
        elif path == "optimizer.arguments":
            usual = {n: a.default for n, a in menu.arguments(config.optimizer.name).items()}
            found |= {f"optimizer.{n}": v for n, v in {**usual, **dict(value)}.items()}
        elif path not in ("preset", "data.files", "data.vocabulary"):
            found[rest or group] = value
    return found


def change(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """The run with settings changed, as by `--set`.

    Args:
      config: where to start.
      assignments: `key=value`, the later ones win.

    Raises:
      ConfigError: an unknown key, a value of another type, or one that the configuration refuses.

    Example:
      >>> from nestedjax.configs import change, run_preset
      >>> run = change(run_preset("hope_nano"), ["steps=20", "memory.chunk_size=64"])
      >>> run.loop.steps, run.model.memory.chunk_size
      (20, 64)
    """
    # which optimizer it is says which arguments there are
    for assignment in sorted(assignments, key=lambda text: not text.startswith("optimizer=")):
        key, equals, text = assignment.partition("=")
        key, known = key.strip(), flat(config)
        if not equals:
            raise ConfigError(f"--set {assignment} has no value; write --set {key}=VALUE")
        if key == "optimizer" or key.startswith("optimizer."):
            config = _with_optimizer(config, key, text)
            continue
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}; {overrides.near(key, known)}")
        groups = ("data", "optimizer", "loop", "model")
        owner = [g for g in groups if key in overrides.settings(getattr(config, g))]
        config = overrides.replace(config, ".".join([*owner, key]), text)
    return config


def _with_optimizer(config: RunConfig, key: str, text: str) -> RunConfig:
    """The run with another optimizer (whose arguments begin anew), or one argument changed."""
    settings = config.optimizer
    _, _, argument = key.partition(".")
    if not argument:
        text = text.strip()
        kept = settings.arguments if text == settings.name else ()
        changes: dict[str, Any] = {"name": text, "arguments": kept}
    else:
        known = menu.arguments(settings.name)
        if argument not in known:
            raise ConfigError(
                f"optimizer={settings.name} has no argument {argument!r}; it has {', '.join(known)}"
            )
        try:
            value = menu.parse(settings.name, argument, text)
        except ValueError as error:
            raise ConfigError(f"{key}: {overrides.one_line(error)}") from error
        given = {**dict(settings.arguments), argument: value}
        others = {name: value for name, value in given.items() if value != known[name].default}
        changes = {"arguments": tuple(sorted(others.items()))}
    optimizer = dataclasses.replace(settings, **changes)
    return dataclasses.replace(config, optimizer=optimizer)


def check(config: RunConfig) -> RunConfig:
    """The run, if its settings fit each other.

    Raises:
      ConfigError: a row shorter than a chunk or not made of whole ones, microbatches or periods
        that do not divide.
    """
    period, length = alignment(config.model), config.data.length
    if length < period:
        raise ConfigError(
            f"length={length} is shorter than a chunk of {period} tokens, so that no memory would "
            f"be written; use length={period} or a smaller memory.chunk_size"
        )
    if length % period:
        raise ConfigError(
            f"length={length} is not a multiple of the chunk of {period} tokens; "
            f"use length={length // period * period}"
        )
    batch, parts = config.data.batch, config.loop.microbatches
    if batch % parts:
        raise ConfigError(f"microbatches={parts} does not divide batch={batch}; change either")
    return config


def alignment(model: ModelConfig) -> int:
    """The common in-context period of a model, in tokens: documents begin on multiples of it."""
    chunks = model.memory.chunk_sizes if isinstance(model, models.HopeConfig) else (1,)
    cms = getattr(model, "cms", None)
    if cms is not None and cms.lifetime == "in_context":
        return math.lcm(*chunks, cms.timed[0])
    return math.lcm(*chunks)


def changed(saved: RunConfig, asked: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between two runs and matter to what they compute: name -> both values.

    More steps are no difference: a run may grow. Nor is where the files lie: the loop compares the
    text itself.
    """
    old, new = flat(saved), flat(asked)
    return {
        name: (old.get(name), new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name) and name not in CHANGEABLE
    }


def to_json(config: RunConfig) -> dict[str, Any]:
    """A run as a JSON object.

    Example:
      >>> from nestedjax import configs
      >>> run = configs.run_preset("hope_nano")
      >>> configs.from_json(configs.to_json(run)) == run
      True
    """
    found = overrides.to_dict(config)
    return found | {"model": {"type": type(config.model).__name__, **found["model"]}}


def from_json(values: Mapping[str, Any]) -> RunConfig:
    """A run from its JSON object.

    Raises:
      ConfigError: it is none, or another version's.
    """
    model = dict(values.get("model", {}))
    kind = MODELS.get(model.pop("type", ""))
    if kind is None:
        raise ConfigError(f"no model type in the run's configuration; known are {list(MODELS)}")
    rest = {name: value for name, value in values.items() if name != "model"}
    groups = {"data": DataConfig, "optimizer": OptimizerConfig, "loop": LoopConfig}
    for name, cls in groups.items():
        if name in rest:
            rest[name] = overrides.from_dict(cls, rest[name])
    return overrides.construct(RunConfig, rest | {"model": overrides.from_dict(kind, model)})
