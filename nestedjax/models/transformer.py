"""Transformer++: pre-norm attention with rotary positions and SwiGLU networks (spec F1)."""

from flax import nnx
from jaxtyping import Array, Bool, Float

from nestedjax.levels import Box
from nestedjax.models.attention import AttentionLayer
from nestedjax.models.boxes import slow
from nestedjax.models.config import TransformerConfig
from nestedjax.models.layers import MLP, RMSNorm, residual_scale


class TransformerBlock(nnx.Module):
    """One block: attention, then a SwiGLU network, each with norm and residual.

    Reference: Touvron et al., Llama (arXiv 2302.13971), section 2.2.
    """

    names = ("attention", "mlp")

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.attention = AttentionLayer(
            config.attention, width, config.layers, dtype=dtype, rngs=rngs
        )
        self.norm = RMSNorm((width,), ("embed",), dtype=dtype)
        scale = residual_scale(config.layers)
        self.mlp = MLP(width, config.hidden, kind="swiglu", dtype=dtype, rngs=rngs, scale=scale)

    def init_state(self, batch: int) -> dict:
        """The state at the start of a context."""
        return self.attention.init_state(batch)

    def mix(
        self, x: Float[Array, "B T d"], state: dict | None, *, resets: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T d"], dict]:
        """Attention over the sequence."""
        return self.attention(x, state, resets=resets)

    def feed(self, x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        """The network on each token."""
        return x + self.mlp(self.norm(x))

    def boxes(self, state: dict) -> list[Box]:
        """The boxes of the block; `state` as `init_state(1)` returns it (arrays or shapes)."""
        return [*self.attention.boxes(state), slow("mlp", self.mlp), slow("norms", self.norm)]
