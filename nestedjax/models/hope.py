"""HOPE: self-modifying Titans followed by a continuum memory (paper eq. 94-97, spec E)."""

import dataclasses

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
from nestedjax.models.presets import PRESETS, SIZES, Size, presets, stream_periods


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


def _preset(size: Size) -> HopeConfig:
    """Heads of width / heads features, memories as wide, four continuum blocks."""
    wide = size.head_dim
    memory = SelfModifyingConfig(
        heads=size.heads, head_dim=wide, hidden=wide, chunk_size=size.chunk_size
    )
    cms = CMSConfig(periods=stream_periods(size), hidden=size.width)
    return HopeConfig(size.vocab, size.width, size.layers, memory, cms, **size.options)


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
presets("hope", _preset, runs={"nano": {"context_rows": 4}})
PRESETS.add("hope_nano_literal", lambda: _literal(SIZES["nano"]))
