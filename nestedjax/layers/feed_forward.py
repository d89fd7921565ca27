"""Feed-forward networks on each token."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from nestedjax.layers.boxes import slow
from nestedjax.layers.layer import Layer
from nestedjax.layers.linear import Linear
from nestedjax.layers.parameters import Sizes, residual_scale
from nestedjax.levels import Box


class MLP(nnx.Module):
    """A feed-forward network: `gelu` W_out gelu(W_in x), `swiglu` W_out (silu(W_gate x) * W_in x).

    Args:
      width: size of input and output.
      hidden: size of the hidden layer.
      kind: "gelu" or "swiglu".
      scale: extra factor on the initial W_out (1/sqrt(2N) in a model of N blocks).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        kind: str,
        dtype: str,
        rngs: nnx.Rngs,
        scale: float = 1.0,
    ):
        up, down = ("embed", "mlp"), ("mlp", "embed")
        self.wi = Linear((width,), (hidden,), up, dtype=dtype, rngs=rngs)
        if kind not in ("gelu", "swiglu"):
            raise ValueError(f"mlp={kind!r}: use 'gelu' or 'swiglu'.")
        gated = kind == "swiglu"
        self.wg = Linear((width,), (hidden,), up, dtype=dtype, rngs=rngs) if gated else None
        self.wo = Linear((hidden,), (width,), down, dtype=dtype, rngs=rngs, scale=scale)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Map x [..., width] to [..., width]."""
        if self.wg is None:
            return self.wo(jax.nn.gelu(self.wi(x)))
        return self.wo(jax.nn.silu(self.wg(x)) * self.wi(x))


class FeedForward(Layer):
    """An `MLP` on each token, as the second half of a block.

    Args:
      config: the model's configuration.
      hidden: width of its hidden layer.
      kind: "gelu" or "swiglu".
      rngs: where the weights are drawn.
    """

    name = "mlp"

    def __init__(self, config: Sizes, hidden: int, *, kind: str = "swiglu", rngs: nnx.Rngs):
        scale = residual_scale(config.layers)
        self.network = MLP(
            config.width, hidden, kind=kind, dtype=config.dtype, rngs=rngs, scale=scale
        )

    def __call__(
        self,
        x: Float[Array, "B T d"],
        state: dict | None = None,
        *,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T d"], dict]:
        """The network on each token, which has no state."""
        return self.network(x), {}

    def boxes(self, state: dict) -> list[Box]:
        """One box, of weights that only the outer optimizer writes."""
        return [slow("mlp", self.network)]
