"""Linear layers and the token embedding, which is the output head, too."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nestedjax.layers.parameters import param, weight, weight_dtype
from nestedjax.optim import MatrixAxes, watch_inputs
from nestedjax.sharding import contract, lookup

EMBED_STD = 0.02


class Linear(nnx.Module):
    """A linear map without bias between any groups of axes: `y = x . kernel`.

    Args:
      inputs: sizes of the trailing axes of x that are contracted.
      outputs: sizes of the axes that replace them.
      axes: logical names of the inputs' and then the outputs' axes.
      scale: the standard deviation of the kernel at the start is scale / sqrt(fan-in), fan-in being
        the product of `inputs`: outputs of order one from inputs of order one, at any width.
      matrix: whether optimizers that treat matrices apart take the kernel for one; not for a gate
        with one output a head.
      dtype: what the product is computed in.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        axes: Sequence[str],
        *,
        dtype: str,
        rngs: nnx.Rngs,
        scale: float = 1.0,
        matrix: bool = True,
    ):
        shape = (*inputs, *outputs)
        value = jax.random.normal(rngs.params(), shape, weight_dtype(dtype))
        ends = range(-len(shape), 0)
        self.kernel = param(
            value * (scale / math.sqrt(math.prod(inputs))),
            axes,
            matrix=MatrixAxes(*map(_axes, (ends[: len(inputs)], ends[len(inputs) :])))
            if matrix
            else None,
            weight_decay=True,
        )
        self.contracted = len(inputs)
        self.dtype = dtype
        self.tap: nnx.Param | None = nnx.data(None)  # see models.add_taps

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Map the last axes of x [..., *inputs] to [..., *outputs]."""
        if self.tap is not None:
            x = watch_inputs(x, self.tap[...], contracted=self.contracted)
        return contract(x.astype(self.dtype), weight(self.kernel, self.dtype), self.contracted)


def _axes(axes: range) -> int | tuple[int, ...]:
    return axes[0] if len(axes) == 1 else tuple(axes)


class Embed(nnx.Module):
    """A token embedding that also is the output head (`attend`).

    The table is drawn from normal(0, std). `attend` divides by std * width, so that with a
    normalised input of any width the first logits are near 0 and the first loss is ln(vocab).
    """

    def __init__(
        self, vocab: int, width: int, *, std: float = EMBED_STD, dtype: str, rngs: nnx.Rngs
    ):
        value = jax.random.normal(rngs.params(), (vocab, width), weight_dtype(dtype))
        self.embedding = param(value * std, ("vocab", "embed"), matrix=None, weight_decay=True)
        self.std = std
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B d"]:
        """The rows of the table that `tokens` name."""
        return lookup(weight(self.embedding, self.dtype), tokens)

    def attend(self, hidden: Float[Array, "*B d"]) -> Float[Array, "*B V"]:
        """Logits in at least float32: the scaled product with every row of the table."""
        wide = self.embedding.dtype
        table = weight(self.embedding, self.dtype)
        scale = 1.0 / (self.std * table.shape[1])
        return jnp.einsum(
            "...d,vd->...v",
            hidden.astype(self.dtype),
            table,
            preferred_element_type=wide,
        ) * jnp.asarray(scale, wide)
