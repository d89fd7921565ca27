"""Softmax attention as the first half of a block: projections, rotary sliding-window attention."""

import dataclasses

from flax import nnx
from jaxtyping import Array, Bool, Float

from nestedjax.fields import Count, Heads, RotaryBase, Taps, check_fields
from nestedjax.layers.boxes import slow
from nestedjax.layers.convolution import CausalConv
from nestedjax.layers.layer import Layer
from nestedjax.layers.linear import Linear
from nestedjax.layers.norm import RMSNorm
from nestedjax.layers.parameters import Sizes, residual_scale
from nestedjax.layers.window_attention import attention, init_attention
from nestedjax.levels import Box
from nestedjax.levels.describe import size


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Sliding-window attention.

    Attributes:
      heads: heads; each has width / heads features.
      context: tokens that a token sees, itself included; the cache holds as many.
      theta: base of the rotary frequencies.
      qk_norm: RMS-normalise queries and keys per head.
      conv: width of a causal convolution on the input, or 0.
    """

    heads: Heads
    context: Count
    theta: RotaryBase = 1e4
    qk_norm: bool = False
    conv: Taps = 0

    def __post_init__(self):
        check_fields(self)


class Attention(Layer):
    """W_o Attention(rope(W_q x), rope(W_k x), W_v x), x optionally convolved (spec F1).

    Args:
      config: the model's configuration; the heads must divide its width.
      attention: heads, window and switches.
      rngs: where the weights are drawn.

    Raises:
      ValueError: the width does not divide into heads of an even number of features.
    """

    name = "attention"

    def __init__(self, config: Sizes, attention: AttentionConfig, *, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        if width % (2 * attention.heads):
            raise ValueError(
                f"heads={attention.heads} need a width that {2 * attention.heads} divides (an even"
                f" number of features a head), got width={width}; change either"
            )
        heads = (attention.heads, width // attention.heads)
        axes = ("embed", "heads", "head_dim")
        self.config = attention
        self.dtype = dtype
        self.head_shape = heads
        conv = (
            CausalConv(attention.conv, (width,), axes[:1], dtype=dtype) if attention.conv else None
        )
        self.conv = conv
        self.query = Linear((width,), heads, axes, dtype=dtype, rngs=rngs)
        self.key = Linear((width,), heads, axes, dtype=dtype, rngs=rngs)
        self.value = Linear((width,), heads, axes, dtype=dtype, rngs=rngs)
        self.query_norm = RMSNorm(heads[1:], axes[2:], dtype=dtype) if attention.qk_norm else None
        self.key_norm = RMSNorm(heads[1:], axes[2:], dtype=dtype) if attention.qk_norm else None
        back = ("heads", "head_dim", "embed")
        scale = residual_scale(config.layers)
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
        state: dict | None = None,
        *,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T d"], dict]:
        """Attend over T more tokens; state None at the start of a context."""
        after: dict = {}
        if self.conv is not None:
            past = state["conv"] if state else self.conv.init_state(x.shape[0])
            x, after["conv"] = self.conv(x, past, resets=resets)
        query, key, value = self.query(x), self.key(x), self.value(x)
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
        return self.out(y), after

    def boxes(self, state: dict) -> list[Box]:
        """The boxes of the layer; `state` as `init_state(1)` returns it (arrays or shapes)."""
        cache = size(state["attention"])
        return [
            Box("attention", 0, 0, cache, "kernel regression", "exact", "nonparam"),
            slow("projections", self.query, self.key, self.value, self.out),
            slow("convolutions", self.conv, state=state.get("conv", ())),
            slow("norms", self.query_norm, self.key_norm),
        ]
