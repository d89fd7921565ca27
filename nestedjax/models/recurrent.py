"""What the configurations of models with one linear memory a head share."""

import dataclasses

from flax import nnx

from nestedjax.fields import Count, Heads
from nestedjax.layers import FeedForward, MemoryMixer, head_dim
from nestedjax.models.block import Block
from nestedjax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(ModelConfig):
    """A sequence mixer with a memory in each head, then a SwiGLU network.

    Attributes:
      hidden: width of the SwiGLU network.
      heads: memories; each has width / heads features.
      chunk_size: tokens solved in parallel; for a linear memory it changes only the speed.
    """

    hidden: Count
    heads: Heads = 4
    chunk_size: Count = 64

    def mixer(self, wide: int, *, rngs: nnx.Rngs) -> MemoryMixer:
        """The sequence mixer, with heads of `wide` features."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its mixer is built")

    def block(self, *, rngs: nnx.Rngs) -> Block:
        """The mixer, then a SwiGLU network."""
        mixer = self.mixer(head_dim(self.width, self.heads), rngs=rngs)
        return Block(self, mixer, FeedForward(self, self.hidden, rngs=rngs))

    @property
    def chunks(self) -> tuple[int, ...]:
        """Tokens between two writes of the memory."""
        return (self.chunk_size,)
