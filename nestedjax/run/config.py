"""The configuration of a run: a model, data, an optimizer and a loop, as frozen dataclasses."""

import dataclasses
from typing import Annotated, Any, Literal

from nestedjax import models
from nestedjax.errors import ConfigError, shown
from nestedjax.fields import (
    Count,
    Decay,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Steps,
    check_fields,
)
from nestedjax.optim import menu
from nestedjax.training import LoopConfig

# A `models.ModelConfig` of any class; a field of that type would make msgspec read the base alone.
ModelConfig = Any


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text of a run, and how a batch is cut out of it.

    Attributes:
      files: text files and folders (.txt, .jsonl, .gz); none for the text that ships with the
        package.
      tokenizer: a SentencePiece `.model` file; none for bytes.
      length: tokens of a row.
      batch: rows of a step.
      order: "shuffled" contexts, or "contiguous" text, where row i goes on with row i of the step
        before.
      context_rows: rows of a context; its state is carried from row to row, without gradient. none:
        one row if shuffled, the whole document if contiguous.
      validation_batches: batches of a validation pass; none for the whole validation split.
    """

    files: tuple[str, ...] = ()
    tokenizer: str | None = None
    length: Count = 256
    batch: Count = 16
    order: Literal["shuffled", "contiguous"] = "shuffled"
    context_rows: Count | None = None
    validation_batches: Count | None = None

    def __post_init__(self):
        check_fields(self)

    @property
    def carries(self) -> bool:
        """Whether a context goes on from one step to the next."""
        rows = self.context_rows
        return self.order == "contiguous" if rows is None else rows > 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The outer optimizer, each block of the continuum memory at its own period.

    Attributes:
      name: one of `nestedjax.optim.menu.OPTIMIZERS`.
      arguments: those of its arguments that differ from its defaults.
      learning_rate: the highest, after the warm-up.
      warmup: steps in which the learning rate rises from 0; at most half of all steps.
      final_fraction: the learning rate of the last step, as a fraction of the highest.
      schedule: how the learning rate falls after the warm-up. "cosine": along a half cosine to the
        last step, so that more steps change the rate of every one. "wsd": constant until the
        cooldown, so that a run may grow until then and is the longer run to the last bit.
      cooldown: the last steps of schedule=wsd, in which the learning rate falls linearly; none for
        a fifth of all.
      weight_decay: decoupled, times the learning rate; of projections and embedding.
      clip: the largest global norm of a gradient; none does not clip.
      b1: decay of the first moment of the AdamW that steps what another optimizer leaves to it.
      b2: decay of its second moment.
    """

    learning_rate: Positive = 1e-3
    warmup: Steps = 100
    final_fraction: Fraction = 0.1
    weight_decay: NonNegative = 0.1
    clip: Positive | None = 1.0
    b1: Decay = 0.9
    b2: Decay = 0.95
    schedule: Literal["cosine", "wsd"] = "cosine"
    cooldown: Count | None = None
    name: str = "adamw"
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_fields(self)
        _check_optimizer(self)
        if self.cooldown is not None and self.schedule != "wsd":
            raise ConfigError(
                f"cooldown={self.cooldown} does nothing with schedule={self.schedule}; give"
                " schedule=wsd"
            )


def _check_optimizer(config: OptimizerConfig) -> None:
    """Refuse a name or arguments that do not exist, and moments that nothing would use."""
    try:
        menu.make(config.name, 1e-3, given=config.arguments)
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
    """A whole run; make one with `run_preset`.

    Attributes:
      preset: the preset that it began from, or the class of its model.
      model: a configuration that `models.build` takes.
      data: the text.
      optimizer: the outer optimizer.
      loop: its length and intervals, in steps.
      seed: of the weights, the order of the data and the samples.
      sample_every: steps between two samples; none for one at the end only.
      given: what `train` was given in place of the run's own: "data", "loss".
    """

    preset: str
    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig(steps=1000)
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # JAX draws with 32 bits of it
    sample_every: Count | None = None
    given: tuple[Literal["data", "loss"], ...] = ()

    def __post_init__(self):
        check_fields(self)
        if not isinstance(self.model, models.ModelConfig):
            raise ConfigError(f"model={shown(self.model)} must be a models.ModelConfig")

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimizer step."""
        return self.data.batch * self.data.length


def check(config: RunConfig) -> RunConfig:
    """The run, if its settings fit each other.

    Raises:
      ConfigError: a row shorter than a chunk or not made of whole ones, microbatches that do not
        divide the batch, a cooldown longer than the run.
    """
    period, length = config.model.period, config.data.length
    if length < period:
        raise ConfigError(
            f"length={length} is shorter than a chunk of {period} tokens, so that no memory would "
            f"be written; use length={period} or a smaller chunk size"
        )
    if length % period:
        raise ConfigError(
            f"length={length} is not a multiple of the chunk of {period} tokens; "
            f"use length={length // period * period}"
        )
    batch, parts = config.data.batch, config.loop.microbatches
    if batch % parts:
        raise ConfigError(f"microbatches={parts} does not divide batch={batch}; change either")
    cooldown, steps = config.optimizer.cooldown, config.loop.steps
    if cooldown is not None and cooldown > steps:
        raise ConfigError(f"cooldown={cooldown} is more than steps={steps}; give at most those")
    return config
