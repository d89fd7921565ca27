"""The continuum memory system: MLP blocks that learn at different periods (paper eq. 70-74, D).

The forward pass is the same for every lifetime of the blocks; what makes it a memory is when each
block is written. In lifetime "stream" the blocks are slow weights that `models.optimizer` steps
every C_l tokens of the training stream; in lifetime "in_context" `InContextModel` gives each
sequence its own, written every C_l tokens of it. Both descend the model's own loss.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from nestedjax.fields import Count, Decay, NonNegative, Positive, Range, check_fields
from nestedjax.layers.boxes import slow
from nestedjax.layers.feed_forward import MLP
from nestedjax.layers.layer import Layer
from nestedjax.layers.norm import RMSNorm
from nestedjax.layers.parameters import Sizes, grouped, param, residual_scale, weight_dtype
from nestedjax.levels import Box
from nestedjax.levels.describe import count


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """How a continuum memory learns inside one context, by the model's own next-token loss.

    Attributes:
      learning_rate: of every block at the start; what multiplies it is learned per block and layer.
      optimizer: "sgd", "momentum" or "adamw" (bias-corrected, b2 0.95).
      momentum: decay of "momentum" and of the first moment of "adamw".
      weight_decay: of "adamw".
      clip: largest global norm of a block's gradient, over its layers; None does not clip.
      reduction: "mean" or "sum" over the tokens of a period.
      second_order: whether the outer gradient goes through the inner one (MAML) or takes it as a
        constant (first-order MAML).
    """

    learning_rate: Annotated[float, Range(0, 1000)] = 0.1
    optimizer: Literal["sgd", "momentum", "adamw"] = "sgd"
    momentum: Decay = 0.9
    weight_decay: NonNegative = 0.0
    clip: Positive | None = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    second_order: bool = True

    def __post_init__(self):
        check_fields(self)
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"weight_decay={self.weight_decay} is of optimizer='adamw', got {self.optimizer!r}"
            )


@dataclasses.dataclass(frozen=True)
class CMSConfig:
    """A continuum memory system.

    Attributes:
      periods: tokens between two writes of each block, fast first; None for a block that is never
        written in context and stepped with everything else in training. Tokens of the training
        stream in lifetime "stream", of the sequence in lifetime "in_context".
      hidden: hidden width of each block.
      form: "sequential", "headwise" or "nested" (sequential; the start of each block is a parameter
        of the next slower one, from which it begins again whenever that one steps).
      mlp: "gelu" or "swiglu".
      lifetime: "stream" (the blocks are outer parameters, stepped at their periods) or
        "in_context" (each sequence has its own, started from learned weights).
      inner: how the blocks learn in lifetime "in_context".
      start: how the starts of form "nested" move: "fomaml", "reptile" or "frozen".
    """

    periods: tuple[Count | None, ...]
    hidden: Count
    form: Literal["sequential", "headwise", "nested"] = "sequential"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    lifetime: Literal["stream", "in_context"] = "stream"
    inner: InnerConfig = InnerConfig()
    start: Literal["fomaml", "reptile", "frozen"] = "fomaml"

    def __post_init__(self):
        check_fields(self)
        if not self.periods:
            raise ValueError("periods=(): a continuum memory needs at least one block")
        timed = self.timed
        for fast, later in zip(timed, timed[1:], strict=False):
            if later % fast:
                raise ValueError(
                    f"periods={self.periods}: {fast} does not divide {later}; list the fast blocks"
                    " first, each period a multiple of the one before"
                )
        if self.start != "fomaml" and self.form != "nested":
            raise ValueError(f"start={self.start!r} is of form='nested', got form={self.form!r}")
        if self.lifetime == "in_context" and not timed:
            raise ValueError(
                f"periods={self.periods} write nothing in context: give a block a period in tokens,"
                " or use lifetime='stream'"
            )
        if self.form == "nested" and len(timed) < 2:
            raise ValueError(
                f"periods={self.periods}: form='nested' needs two blocks with a period; use"
                " form='sequential'"
            )

    @property
    def timed(self) -> tuple[int, ...]:
        """The periods of the blocks that have one, fast first."""
        return tuple(period for period in self.periods if period is not None)

    @property
    def block_periods(self) -> dict[str, int]:
        """ "cms.0" (the fastest), "cms.1", ... -> period in tokens, of the blocks that have one."""
        return {f"cms.{i}": period for i, period in enumerate(self.periods) if period is not None}


class ContinuumMemory(Layer):
    """A chain of residual MLPs, the fastest first, or the same MLPs side by side.

    `sequential` and `nested`: z_l = z_{l-1} + MLP_l(norm_l(z_{l-1})). `headwise`: y = x + sum_l a_l
    MLP_l(norm(x)) with a = softmax of free weights, 1/k at the start (eq. 74). The paper prints
    neither norms nor residuals; both are needed to train (spec D2).

    Args:
      config: the model's configuration.
      cms: blocks, widths and periods.
      rngs: where the weights are drawn.
    """

    name = "cms"
    residual = False  # each block has norm and residual of its own

    def __init__(self, config: Sizes, cms: CMSConfig, *, rngs: nnx.Rngs):
        self.config = cms
        width, dtype, scale = config.width, config.dtype, residual_scale(config.layers)
        headwise = cms.form == "headwise"
        norms = 1 if headwise else len(cms.periods)
        self.norms = nnx.List([RMSNorm((width,), ("embed",), dtype=dtype) for _ in range(norms)])
        self.levels = nnx.List(
            [
                MLP(width, cms.hidden, kind=cms.mlp, dtype=dtype, rngs=rngs, scale=scale)
                for _ in cms.periods
            ]
        )
        start = jnp.zeros((len(cms.periods),), weight_dtype(dtype))
        shares = param(start, ("levels",), matrix=None, weight_decay=False)
        self.weights = shares if headwise else None
        self.skipped: tuple[int, ...] = ()  # blocks that add nothing; see `models.switched`
        for index, level in enumerate(self.levels):
            grouped(level, f"cms.{index}")

    def __call__(
        self,
        x: Float[Array, "B T d"],
        state: dict | None = None,
        *,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T d"], dict]:
        """Pass x [B, T, d] through every block; what they learn is no state of a call."""
        if self.weights is not None:
            share = jax.nn.softmax(self.weights[...]).astype(x.dtype)
            h = self.norms[0](x)
            for index, level in enumerate(self.levels):
                x = x if index in self.skipped else x + share[index] * level(h)
            return x, {}
        for index, (norm, level) in enumerate(zip(self.norms, self.levels, strict=True)):
            x = x if index in self.skipped else x + level(norm(x))
        return x, {}

    def boxes(self, state: dict) -> list[Box]:
        """A box for each block, of lifetime "stream"."""
        boxes = [slow("norms", *self.norms)]
        if self.weights is not None:
            boxes.append(Box("cms shares", None, self.weights.size, 0, "next token", "", "param"))
        for index, (level, period) in enumerate(zip(self.levels, self.config.periods, strict=True)):
            size, rule = count(nnx.state(level, nnx.Param)), "optimizer" if period else ""
            name = f"cms.{index}"
            boxes.append(Box(name, period, size, 0, "next token", rule, "backprop"))
        return boxes
