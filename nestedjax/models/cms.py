"""The continuum memory system: MLP blocks that learn at different periods (paper eq. 70-74, D).

The forward pass is the same for every lifetime of the blocks; what makes it a memory is when each
block is written. In lifetime "stream" the blocks are slow weights that `models.optimizer` steps
every C_l tokens of the training stream; in lifetime "in_context" `InContextModel` gives each
sequence its own, written every C_l tokens of it. Both descend the model's own loss.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nestedjax.levels import Box
from nestedjax.models.boxes import count, slow
from nestedjax.models.config import CMSConfig
from nestedjax.models.layers import MLP, RMSNorm, param, residual_scale, weight_dtype


class ContinuumMemory(nnx.Module):
    """A chain of residual MLPs, the fastest first, or the same MLPs side by side.

    `sequential` and `nested`: z_l = z_{l-1} + MLP_l(norm_l(z_{l-1})). `headwise`: y = x + sum_l a_l
    MLP_l(norm(x)) with a = softmax of free weights, 1/k at the start (eq. 74). The paper prints
    neither norms nor residuals; both are needed to train (spec D2).

    Args:
      config: blocks, widths and periods.
      width: features of the residual stream.
      layers: layers of the model, for the scale of the output projections.
    """

    def __init__(self, config: CMSConfig, width: int, layers: int, *, dtype: str, rngs: nnx.Rngs):
        self.config = config
        scale = residual_scale(layers)
        headwise = config.form == "headwise"
        norms = 1 if headwise else len(config.periods)
        self.norms = nnx.List([RMSNorm((width,), ("embed",), dtype=dtype) for _ in range(norms)])
        self.levels = nnx.List(
            [
                MLP(width, config.hidden, kind=config.mlp, dtype=dtype, rngs=rngs, scale=scale)
                for _ in config.periods
            ]
        )
        start = jnp.zeros((len(config.periods),), weight_dtype(dtype))
        self.weights = param(start, "levels") if headwise else None

    def __call__(self, x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        """Pass x [B, T, d] through every block."""
        if self.weights is not None:
            share = jax.nn.softmax(self.weights[...]).astype(x.dtype)
            h = self.norms[0](x)
            for index, level in enumerate(self.levels):
                x = x + share[index] * level(h)
            return x
        for norm, level in zip(self.norms, self.levels, strict=True):
            x = x + level(norm(x))
        return x

    def boxes(self) -> list[Box]:
        """A box for each block, of lifetime "stream"."""
        boxes = [slow("norms", *self.norms)]
        if self.weights is not None:
            boxes.append(Box("cms shares", None, self.weights.size, 0, "next token", "", "param"))
        for index, (level, period) in enumerate(zip(self.levels, self.config.periods, strict=True)):
            size, rule = count(nnx.state(level, nnx.Param)), "optimizer" if period else ""
            name = f"cms.{index}"
            boxes.append(Box(name, period, size, 0, "next token", rule, "backprop"))
        return boxes
