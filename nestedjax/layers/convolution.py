"""Causal convolution over time."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from nestedjax.layers.parameters import param, weight, weight_dtype
from nestedjax.sharding import constrain


class CausalConv(nnx.Module):
    """A causal depthwise convolution over time, the identity at initialisation.

    y_t = sum_j kernel[width - 1 - j] * x_{t-j}, over the inputs of token t's own document only. Its
    state holds the last width - 1 inputs (zeros before the document's start).

    Args:
      width: taps, in tokens.
      shape: sizes of the trailing axes of x, each feature with taps of its own.
      axes: their logical names.
      dtype: what it is computed in.
    """

    def __init__(self, width: int, shape: Sequence[int], axes: Sequence[str], *, dtype: str):
        taps = jnp.zeros((width, *shape), weight_dtype(dtype)).at[-1].set(1.0)
        self.kernel = param(taps, ("taps", *axes), matrix=None, weight_decay=False)
        self.axes = tuple(None if name == "embed" else name for name in axes)
        self.dtype = dtype
        self.skipped = False  # see `models.switched`

    def init_state(self, batch: int) -> Float[Array, "B w *shape"]:
        """The state at the start of a context."""
        width, *shape = self.kernel.shape
        empty = jnp.zeros((batch, width - 1, *shape), self.dtype)
        return constrain(empty, "batch", None, *self.axes)

    def __call__(
        self,
        x: Float[Array, "B T *shape"],
        state: Float[Array, "B w *shape"],
        *,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T *shape"], Float[Array, "B w *shape"]]:
        """Convolve T more tokens; `resets` marks the first token of each new document."""
        kernel = weight(self.kernel, self.dtype)
        past, length, wide = kernel.shape[0] - 1, x.shape[1], (1,) * (x.ndim - 2)
        inputs = jnp.concatenate([state, x.astype(self.dtype)], axis=1)
        document = None
        if resets is not None:
            count = jnp.cumsum(resets.astype(jnp.int32), axis=1)
            document = jnp.pad(count, ((0, 0), (past, 0)))
        y = jnp.zeros((), self.dtype)
        for tap in range(past + 1):
            term = inputs[:, tap : tap + length]
            if document is not None:
                same = document[:, tap : tap + length] == document[:, past:]
                term = jnp.where(same.reshape(*same.shape, *wide), term, 0.0)
            y = y + term * kernel[tap][None, None]
        last = inputs[:, length:]
        if document is not None:
            same = document[:, length:] == document[:, -1:]
            last = jnp.where(same.reshape(*same.shape, *wide), last, 0.0)
        return (x.astype(y.dtype) if self.skipped else y), last
