"""HOPE-Attention: softmax attention followed by a continuum memory (paper eq. 94-97, spec E)."""

from flax import nnx
from jaxtyping import Array, Bool, Float

from nestedjax.levels import Box
from nestedjax.models.attention import AttentionLayer
from nestedjax.models.cms import ContinuumMemory
from nestedjax.models.config import HopeAttentionConfig


class HopeAttentionBlock(nnx.Module):
    """One block: attention, then the continuum memory, each with norm and residual.

    With one frozen SwiGLU block in the continuum memory it is the block of Transformer++.
    """

    names = ("attention", "cms")

    def __init__(self, config: HopeAttentionConfig, *, rngs: nnx.Rngs):
        width, layers, dtype = config.width, config.layers, config.dtype
        self.attention = AttentionLayer(config.attention, width, layers, dtype=dtype, rngs=rngs)
        self.cms = ContinuumMemory(config.cms, width, layers, dtype=dtype, rngs=rngs)

    def init_state(self, batch: int) -> dict:
        """The state at the start of a context."""
        return self.attention.init_state(batch)

    def mix(
        self, x: Float[Array, "B T d"], state: dict | None, *, resets: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T d"], dict]:
        """Attention over the sequence."""
        return self.attention(x, state, resets=resets)

    def feed(self, x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        """The continuum memory on each token."""
        return self.cms(x)

    def boxes(self, state: dict) -> list[Box]:
        """The boxes of the block; `state` as `init_state(1)` returns it (arrays or shapes)."""
        return [*self.attention.boxes(state), *self.cms.boxes()]
