"""The attention half of a block: norm, projections, rotary sliding-window attention, residual."""

from flax import nnx
from jaxtyping import Array, Bool, Float

from nestedjax.levels import Box
from nestedjax.mixers.attention import attention, init_attention
from nestedjax.models.boxes import size, slow
from nestedjax.models.config import AttentionConfig
from nestedjax.models.layers import CausalConv, Linear, RMSNorm, residual_scale


class AttentionLayer(nnx.Module):
    """x + W_o Attention(rope(W_q h), rope(W_k h), W_v h), h = RMSNorm(x) (optionally convolved).

    Args:
      config: heads, window and switches.
      width: features of the residual stream; the heads must divide it.
      layers: blocks of the model, for the scale of W_o.
    """

    def __init__(
        self, config: AttentionConfig, width: int, layers: int, *, dtype: str, rngs: nnx.Rngs
    ):
        if width % (2 * config.heads):
            raise ValueError(
                f"{config.heads} heads need a width that {2 * config.heads} divides (an even number"
                f" of features a head), got {width}."
            )
        heads = (config.heads, width // config.heads)
        axes = ("embed", "heads", "head_dim")
        self.config = config
        self.dtype = dtype
        self.head_shape = heads
        self.norm = RMSNorm((width,), ("embed",), dtype=dtype)
        self.conv = CausalConv(config.conv, width, dtype=dtype) if config.conv else None
        self.query = Linear((width,), heads, axes, dtype=dtype, rngs=rngs)
        self.key = Linear((width,), heads, axes, dtype=dtype, rngs=rngs)
        self.value = Linear((width,), heads, axes, dtype=dtype, rngs=rngs)
        self.query_norm = RMSNorm(heads[1:], axes[2:], dtype=dtype) if config.qk_norm else None
        self.key_norm = RMSNorm(heads[1:], axes[2:], dtype=dtype) if config.qk_norm else None
        back = ("heads", "head_dim", "embed")
        scale = residual_scale(layers)
        self.out = Linear(heads, (width,), back, dtype=dtype, rngs=rngs, scale=scale)

    def init_state(self, batch: int) -> dict:
        """The state at the start of a context."""
        state: dict = {
            "attention": init_attention(batch, self.config.context, *self.head_shape, self.dtype)
        }
        if self.conv is not None:
            state["conv"] = self.conv.init_state(batch)
        return state

    def __call__(
        self,
        x: Float[Array, "B T d"],
        state: dict | None,
        *,
        resets: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T d"], dict]:
        """Attend over T more tokens; state None at the start of a context."""
        after: dict = {}
        h = self.norm(x)
        if self.conv is not None:
            past = state["conv"] if state else self.conv.init_state(x.shape[0])
            h, after["conv"] = self.conv(h, past, resets=resets)
        query, key, value = self.query(h), self.key(h), self.value(h)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        y, after["attention"] = attention(
            query,
            key,
            value,
            state["attention"] if state else None,
            window=self.config.context,
            resets=resets,
            theta=self.config.theta,
        )
        return x + self.out(y), after

    def boxes(self, state: dict) -> list[Box]:
        """The boxes of the layer; `state` as `init_state(1)` returns it (arrays or shapes)."""
        cache = size(state["attention"])
        return [
            Box("attention", 0, 0, cache, "kernel regression", "exact", "nonparam"),
            slow("projections", self.query, self.key, self.value, self.out),
            slow("convolutions", self.conv, state=state.get("conv", ())),
            slow("norms", self.norm, self.query_norm, self.key_norm),
        ]
