"""Transformer++: pre-norm attention with rotary positions and SwiGLU networks (spec F1)."""

import dataclasses

from flax import nnx

from nestedjax.fields import Count
from nestedjax.layers import Attention, AttentionConfig, FeedForward
from nestedjax.models.block import Block
from nestedjax.models.config import ModelConfig
from nestedjax.models.presets import Size, attention_blocks, fitted, presets


@dataclasses.dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """Transformer++ (spec F1; Touvron et al., Llama, arXiv 2302.13971, section 2.2).

    Attributes:
      hidden: width of the SwiGLU network.
      attention: its heads and window.
    """

    hidden: Count
    attention: AttentionConfig

    def block(self, *, rngs: nnx.Rngs) -> Block:
        """Attention, then a SwiGLU network."""
        mixer = Attention(self, self.attention, rngs=rngs)
        return Block(self, mixer, FeedForward(self, self.hidden, rngs=rngs))


def _preset(size: Size) -> TransformerConfig:
    attention = AttentionConfig(heads=size.heads, context=size.context)

    def make(hidden: int) -> TransformerConfig:
        layers = attention_blocks(size)
        return TransformerConfig(size.vocab, size.width, layers, hidden, attention, **size.options)

    return fitted(make, size)


presets("transformer", _preset)
