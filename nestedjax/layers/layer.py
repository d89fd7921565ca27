"""What the two halves of a block have in common: a layer with a state, and its boxes."""

from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Bool, Float

from nestedjax.levels import Box

PyTree = Any


class Layer(nnx.Module):
    """A sequence mixer or a feed-forward network: what a `models.Block` is made of.

    The block owns norm and residual: it computes `x + layer(norm(x))`. A layer's state belongs to
    each sequence; feeding a sequence in any number of pieces gives what feeding it whole gives. A
    layer without a state keeps the two methods below as they are and returns `{}`.

    Attributes:
      name: what probes and messages call it.
      residual: whether the block adds norm and residual; False for a layer that has its own.
      shares: whether the layer of the first block hands a value on to those above it. Its call
        then takes `first=`, that value (None in the first block), and returns
        `(y, state, value)`; see `models.block`.
    """

    name: ClassVar[str] = "layer"
    residual: ClassVar[bool] = True
    shares: ClassVar[bool] = False

    def init_state(self, batch: int) -> PyTree:
        """The state of `batch` sequences at the start of a context; leaves [batch, ...]."""
        del batch
        return {}

    def __call__(
        self,
        x: Float[Array, "B T d"],
        state: PyTree = None,
        *,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T d"], PyTree]:
        """What T more tokens give, and the state after them.

        Args:
          x: normalised activations.
          state: from `init_state` or an earlier call; None at the start of a context.
          resets: True at the first token of a new document.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it computes")

    def boxes(self, state: PyTree) -> list[Box]:
        """The boxes of the layer; `state` as `init_state(1)` returns it (arrays or shapes)."""
        raise NotImplementedError(f"{type(self).__name__} does not list its boxes")
