"""HOPE: self-modifying Titans followed by a continuum memory (paper eq. 94-97, spec E)."""

import dataclasses
import math

from flax import nnx

from nestedjax.layers import (
    CMSConfig,
    ContinuumMemory,
    RuleConfig,
    SelfModifyingConfig,
    self_modifying_mixer,
)
from nestedjax.models.block import Block
from nestedjax.models.config import ModelConfig
from nestedjax.models.presets import PRESETS, SIZES, Size, fitted, presets, stream_periods


@dataclasses.dataclass(frozen=True)
class HopeConfig(ModelConfig):
    """HOPE (spec E).

    Attributes:
      memory: the self-modifying memory.
      cms: the continuum memory.
      literal: the printed form: nothing projected but the query, no gate, o added to x.

    Raises:
      ValueError: a kernel for a memory that has none.
    """

    memory: SelfModifyingConfig
    cms: CMSConfig
    literal: bool = False

    def __post_init__(self):
        ModelConfig.__post_init__(self)
        try:
            self.memory.check_kernel(self.implementation)
        except NotImplementedError as error:
            raise ValueError(str(error)) from None

    def block(self, *, rngs: nnx.Rngs) -> Block:
        """The self-modifying memory, then the continuum memory."""
        mixer = self_modifying_mixer(self, self.memory, literal=self.literal, rngs=rngs)
        return Block(self, mixer, ContinuumMemory(self, self.cms, rngs=rngs))

    @property
    def chunks(self) -> tuple[int, ...]:
        """Tokens between two writes of the queried memory and of the others."""
        return self.memory.chunk_sizes

    @property
    def continuum(self) -> CMSConfig:
        """The continuum memory of the blocks."""
        return self.cms


# A token corrects its error once, toward a target of norm one, at a rate near one; the memories
# that generate keys, values and gates are written at a rate of their own, more slowly.
REMEMBERS = RuleConfig(
    objective="delta", targets="unit", dgd="none", inner_clip=None, decay_to="start"
)


def _memory(size: Size, **changes) -> SelfModifyingConfig:
    """Heads of width / heads features, and what the memories need to be of use (docs/math.md)."""
    wide = size.head_dim
    memory = SelfModifyingConfig(
        heads=size.heads,
        head_dim=wide,
        hidden=wide,
        chunk_size=size.chunk_size,
        rule=dataclasses.replace(REMEMBERS, written="outer", step="normalised"),
        momentum=False,
        read="running",
        learning_rate_start=0.8,
        projection_learning_rate=0.02,
        gate_gain=math.sqrt(wide),
        convolution="streams",
        inputs="silu",
        output_gate="sigmoid",
    )
    return dataclasses.replace(memory, **changes)


def _preset(size: Size) -> HopeConfig:
    """MLP memories as wide as their heads, of which the output matrix is written."""
    cms = CMSConfig(periods=stream_periods(size), hidden=size.width)
    return HopeConfig(size.vocab, size.width, size.layers, _memory(size), cms, **size.options)


def _linear(size: Size) -> HopeConfig:
    """Linear memories, which share one transition a level."""
    memory = _memory(size, architecture="linear", rule=REMEMBERS)

    def make(hidden: int) -> HopeConfig:
        cms = CMSConfig(periods=stream_periods(size), hidden=hidden)
        return HopeConfig(size.vocab, size.width, size.layers, memory, cms, **size.options)

    return fitted(make, size)


def _literal(size: Size) -> HopeConfig:
    """The equations as printed, errata applied (spec I): one head as wide as the model, nothing
    projected but the query, chunk-start reads, no momentum, no clip of the inner error."""
    memory = SelfModifyingConfig(
        heads=1,
        head_dim=size.width,
        hidden=size.width,
        read="anchor",
        momentum=False,
        rule=RuleConfig(inner_clip=None),
    )
    return dataclasses.replace(_preset(size), memory=memory, literal=True)


# Contexts of 1,024 bytes in rows of 256: so its memories stay useful in a text of any length.
RUNS = {"nano": {"context_rows": 4, "learning_rate": 8e-3}}
presets("hope", _preset, runs=RUNS)
presets("hope_linear", _linear, runs=RUNS)
PRESETS.add("hope_nano_literal", lambda: _literal(SIZES["nano"]))
