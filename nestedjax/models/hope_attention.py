"""HOPE-Attention: softmax attention followed by a continuum memory (paper eq. 94-97, spec E)."""

import dataclasses

from flax import nnx

from nestedjax.layers import Attention, AttentionConfig, CMSConfig, ContinuumMemory
from nestedjax.models.block import Block
from nestedjax.models.config import ModelConfig
from nestedjax.models.presets import Size, attention_blocks, fitted, presets, stream_periods


@dataclasses.dataclass(frozen=True)
class HopeAttentionConfig(ModelConfig):
    """HOPE-Attention: softmax attention in place of the self-modifying memory (spec E).

    With one frozen SwiGLU block in the continuum memory it is Transformer++.

    Attributes:
      attention: its heads and window.
      cms: the continuum memory.
    """

    attention: AttentionConfig
    cms: CMSConfig

    def block(self, *, rngs: nnx.Rngs) -> Block:
        """Attention, then the continuum memory."""
        mixer = Attention(self, self.attention, rngs=rngs)
        return Block(self, mixer, ContinuumMemory(self, self.cms, rngs=rngs))

    @property
    def continuum(self) -> CMSConfig:
        """The continuum memory of the blocks."""
        return self.cms


def _preset(size: Size) -> HopeAttentionConfig:
    attention = AttentionConfig(heads=size.heads, context=size.context)

    def make(hidden: int) -> HopeAttentionConfig:
        cms = CMSConfig(periods=stream_periods(size), hidden=hidden)
        layers = attention_blocks(size)
        return HopeAttentionConfig(size.vocab, size.width, layers, attention, cms, **size.options)

    return fitted(make, size)


presets("hope_attention", _preset)
