"""The named sizes of every architecture: one name is one size, whatever the architecture.

An architecture's presets stand at the foot of its own file, in one call of `presets`; importing
that file from `nestedjax.models` puts them into `PRESETS`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from nestedjax.models.config import ModelConfig
from nestedjax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Size:
    """What all architectures of one size share.

    Attributes:
      name: of the size.
      vocab: tokens in the vocabulary.
      width: features of the residual stream.
      layers: blocks of HOPE; the others have as many as their own blocks' parameters allow.
      heads: of every mixer.
      chunk_size: tokens of a memory's chunk.
      context: tokens that attention sees.
      step_tokens: tokens in one optimizer step (batch x length) of the runs that the presets are
        made for. The periods of the continuum memories are multiples of it, so a run's own must
        divide them.
      options: further fields of `ModelConfig`.
    """

    name: str
    vocab: int
    width: int
    layers: int
    heads: int
    chunk_size: int
    context: int
    step_tokens: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.width // self.heads

    @property
    def unit(self) -> int:
        """What the width of a feed-forward network is a multiple of."""
        return 64 if self.width >= 1024 else 8


LARGE = {"dtype": "bfloat16", "remat": "full"}
SIZES = {
    size.name: size
    for size in (
        Size("nano", 256, 128, 2, 4, 32, 256, 2048),
        Size("micro", 8192, 256, 6, 4, 16, 1024, 8192),
        Size("mini", 8192, 512, 8, 8, 16, 2048, 16384, {"remat": "dots"}),
        Size("340m", 32000, 1024, 22, 16, 16, 4096, 2**19, LARGE),
        Size("760m", 32000, 1536, 22, 16, 16, 4096, 2**19, LARGE),
        Size("1p3b", 32000, 2048, 22, 16, 16, 4096, 2**19, LARGE),
    )
}


class Presets(Mapping[str, ModelConfig]):
    """Name -> configuration, made when it is asked for: a width may have to be solved for it."""

    def __init__(self):
        self._makers: dict[str, Callable[[], ModelConfig]] = {}
        self._runs: dict[str, Mapping[str, Any]] = {}

    def add(
        self, name: str, make: Callable[[], ModelConfig], *, run: Mapping[str, Any] | None = None
    ) -> None:
        """Register a preset.

        Args:
          name: ends in the name of a size, whose run it is trained with.
          make: its configuration.
          run: settings in which its run differs from that of its size, as `nj.run_preset` has them.

        Raises:
          ValueError: the name is taken.
        """
        if name in self._makers:
            raise ValueError(f"there is a preset {name!r} already; give another name")
        self._makers[name] = functools.cache(make)
        self._runs[name] = run or {}

    def run(self, name: str) -> Mapping[str, Any]:
        """Settings in which a preset's run differs from that of its size."""
        return self._runs[name]

    def __getitem__(self, name: str) -> ModelConfig:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


PRESETS = Presets()
Config = TypeVar("Config", bound=ModelConfig)


def presets(
    family: str,
    make: Callable[[Size], ModelConfig],
    *,
    runs: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Register `FAMILY_SIZE` for every size.

    Args:
      family: first part of the names.
      make: the configuration of a size.
      runs: for a size's name, see `run` of `Presets.add`.
    """
    for name, size in SIZES.items():
        run = (runs or {}).get(name)
        PRESETS.add(f"{family}_{name}", functools.partial(make, size), run=run)


def size_of(preset: str) -> str:
    """The size in a preset's name.

    Example:
      >>> from nestedjax import models
      >>> models.size_of("hope_attention_340m")
      '340m'
    """
    return next(part for part in preset.split("_") if part in SIZES)


@functools.cache
def budget(name: str) -> int:
    """The parameters that every architecture of a size has, within 1%: those of HOPE (spec E)."""
    return parameters(PRESETS[f"hope_{name}"])


def attention_blocks(size: Size) -> int:
    """As many blocks of 12 d^2 parameters (attention, a network of 8 d^2) as equal HOPE's."""
    total = size.layers * (13 * size.width**2 + 10 * size.width * size.head_dim)
    return round(total / (12 * size.width**2))


def fitted(make: Callable[[int], Config], size: Size) -> Config:
    """The configuration whose feed-forward width gives it the budget of its size, within 1%.

    Parameters grow linearly with that width, so that two abstract models tell which one it is. It
    is a multiple of the largest power of two, up to `size.unit`, that allows 1%.

    Args:
      make: `make(hidden) -> configuration`.
      size: whose `budget` is met.

    Raises:
      ValueError: no width meets it: the blocks are too many or too large.
    """
    low, high = (parameters(make(hidden)) for hidden in (size.unit, 2 * size.unit))
    slope, target = (high - low) / size.unit, budget(size.name)
    wanted, unit = size.unit + (target - low) / slope, size.unit
    while unit > 1 and abs(round(wanted / unit) * unit - wanted) * slope > 0.01 * target:
        unit //= 2
    hidden = round(wanted / unit) * unit
    if hidden < 1 or abs(hidden - wanted) * slope > 0.01 * target:
        raise ValueError(
            f"{type(make(size.unit)).__name__} meets the {target:,} parameters of its size with no"
            f" feed-forward width (it would be {wanted:.1f}): change its layers"
        )
    return make(hidden)


def parameters(config: ModelConfig) -> int:
    """How many slow parameters the language model of a configuration has; nothing is allocated."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


# Optimizer steps between two writes of each block of a continuum memory, the fastest first.
STEPS = (1, 2, 4, 8)


def stream_periods(size: Size) -> tuple[int, ...]:
    """Periods in tokens of four continuum blocks in the runs that a size is made for."""
    return tuple(steps * size.step_tokens for steps in STEPS)


def linear_presets(family: str, architecture: Callable[..., ModelConfig]) -> None:
    """Register `FAMILY_SIZE` of an architecture whose fields begin with `hidden` and `heads`.

    Args:
      family: first part of the names.
      architecture: its configuration class.
    """

    def make(size: Size) -> ModelConfig:
        sizes = size.vocab, size.width, attention_blocks(size)
        return fitted(lambda h: architecture(*sizes, h, size.heads, **size.options), size)

    presets(family, make)
