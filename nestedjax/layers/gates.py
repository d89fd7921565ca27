"""The menu of a `MemoryMixer`'s slots: feature maps, gates, outputs and starts.

A feature map is a function of an array [..., k]. The others may have weights, so that a menu entry
is a maker: called with the model's configuration and the mixer's `Heads`, it returns a module.

| slot | entries |
|---|---|
| feature map of a stream | `identity`, `silu`, `unit`, `unit_silu`, `elu_plus_one`, `scaled(c)` |
| gate: learning rate, decay, momentum, threshold | `constant`, `sigmoid`, `exponential_decay` |
| output | `plain`, `norm`, `gated_norm` |
| start of the memory | `empty`, `learned` |
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from nestedjax.errors import require_range
from nestedjax.layers.boxes import slow
from nestedjax.layers.linear import Linear
from nestedjax.layers.norm import RMSNorm
from nestedjax.layers.parameters import Sizes, param, weight, weight_dtype
from nestedjax.levels import Box
from nestedjax.memory import Architecture, elu_plus_one, identity, l2_normalise
from nestedjax.optim import MatrixAxes

PyTree = Any
FeatureMap = Callable[[Array], Array]


class Heads(NamedTuple):
    """The shape of a mixer's memories.

    Attributes:
      heads: how many.
      key_dim: features of a key and of a query.
      value_dim: features of a value and of a read.
    """

    heads: int
    key_dim: int
    value_dim: int


Maker = Callable[..., Any]  # maker(config, heads, rngs=) -> an nnx.Module

# Feature maps.

silu = jax.nn.silu
unit = l2_normalise


def unit_silu(x: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """`unit(silu(x))`: DeltaNet's keys and queries."""
    return unit(silu(x))


def scaled(factor: float) -> FeatureMap:
    """`factor * x`.

    Raises:
      ValueError: a factor that is not finite.
    """
    require_range("scaled: factor", factor, -math.inf)
    return lambda x: x * factor


# Gates: one number for every token and head, in at least float32.


class Constant(nnx.Module):
    """The same number at every token; see `constant`."""

    def __init__(self, config: Sizes, values: Sequence[float]):
        self.values = tuple(values)
        self.dtype = config.dtype

    def __call__(self, x: Float[Array, "B T d"]) -> Float[Array, "B T H"]:
        """The values of the heads for every token of x."""
        values = jnp.asarray(np.array(self.values), weight_dtype(self.dtype))
        return jnp.broadcast_to(values[None, None], (*x.shape[:2], values.size))


class Projected(nnx.Module):
    """`maximum * sigmoid(W x + bias)`; see `sigmoid`."""

    def __init__(
        self,
        config: Sizes,
        heads: Heads,
        *,
        bias: float | None,
        maximum: float,
        scale: float,
        rngs: nnx.Rngs,
    ):
        axes, dtype = ("embed", "heads"), config.dtype
        self.logit = Linear(
            (config.width,), heads[:1], axes, dtype=dtype, rngs=rngs, scale=scale, matrix=False
        )
        start = jnp.full(heads[:1], 0.0 if bias is None else bias, weight_dtype(dtype))
        offset = param(start, ("heads",), matrix=None, weight_decay=False)
        self.bias = nnx.data(None) if bias is None else offset
        self.maximum = maximum
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B T d"]) -> Float[Array, "B T H"]:
        """The gate of every token of x."""
        logit = self.logit(x).astype(weight_dtype(self.dtype))
        if self.bias is not None:
            logit = logit + weight(self.bias)[None, None]
        gate = jax.nn.sigmoid(logit)
        return gate if self.maximum == 1 else gate * self.maximum


class ExponentialDecay(nnx.Module):
    """`exp(-exp(a) softplus(W x + b))`; see `exponential_decay`."""

    def __init__(self, config: Sizes, heads: Heads, *, rngs: nnx.Rngs):
        dtype, wide = config.dtype, weight_dtype(config.dtype)
        self.logit = Linear(
            (config.width,), heads[:1], ("embed", "heads"), dtype=dtype, rngs=rngs, matrix=False
        )
        rate = jax.random.uniform(rngs.params(), heads[:1], wide, 1.0, 16.0)
        spread = jax.random.uniform(rngs.params(), heads[:1], wide)
        step = jnp.exp(spread * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        offset = step + jnp.log(-jnp.expm1(-step))  # softplus of it is the step
        self.log_rate = param(jnp.log(rate), ("heads",), matrix=None, weight_decay=False)
        self.bias = param(offset, ("heads",), matrix=None, weight_decay=False)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B T d"]) -> Float[Array, "B T H"]:
        """The decay of every token of x, in (0, 1]."""
        logit = self.logit(x).astype(weight_dtype(self.dtype)) + weight(self.bias)[None, None]
        return jnp.exp(-jnp.exp(weight(self.log_rate))[None, None] * jax.nn.softplus(logit))


def constant(values: float | Sequence[float]) -> Maker:
    """The same number at every token, without weights: one for all heads, or one for each.

    Raises:
      ValueError: a value that is not finite; when it is made, other than one or one for each head.
    """
    for value in [values] if isinstance(values, int | float) else values:
        require_range("constant: value", value, -math.inf)

    def make(config: Sizes, heads: Heads, *, rngs: nnx.Rngs) -> Constant:
        own = [values] * heads.heads if isinstance(values, int | float) else list(values)
        if len(own) != heads.heads:
            raise ValueError(
                f"constant gate: {len(own)} values for {heads.heads} heads; give one each"
            )
        return Constant(config, [float(value) for value in own])

    return make


def sigmoid(*, bias: float | None = None, maximum: float = 1.0, scale: float = 1.0) -> Maker:
    """`maximum * sigmoid(W x + b)`.

    Args:
      bias: b at the start; None for a gate without one.
      maximum: its upper bound; 2 lets a delta rule reflect.
      scale: the standard deviation of W at the start is scale / sqrt(width).

    Raises:
      ValueError: maximum <= 0, scale < 0, or a bias that is not finite.
    """
    require_range("sigmoid: bias", 0.0 if bias is None else bias, -math.inf)
    require_range("sigmoid: maximum", maximum, 0, closed="neither")
    require_range("sigmoid: scale", scale, 0)

    def make(config: Sizes, heads: Heads, *, rngs: nnx.Rngs) -> Projected:
        return Projected(config, heads, bias=bias, maximum=maximum, scale=scale, rngs=rngs)

    return make


def exponential_decay() -> Maker:
    """`exp(-exp(a) softplus(W x + b))`, the decay of Mamba2.

    At the start exp(a) is drawn from U(1, 16), softplus(b) log-uniformly from [0.001, 0.1].

    Reference: Mamba2 (arXiv 2405.21060); Gated DeltaNet (arXiv 2412.06464).
    """
    return ExponentialDecay


# What the numbers of a slot are multiplied with has to stay bounded.
_SLOTS = {"learning_rate": (0.0, math.inf), "decay": (0.0, 1.0), "momentum": (0.0, 1.0)}


def check_slot(slot: str, gate: Any) -> None:
    """Refuse a gate that leaves the range of its slot, as far as it says so without its input.

    Raises:
      ValueError: a constant outside of it, or a sigmoid with a larger maximum.
    """
    if slot not in _SLOTS:
        return
    if isinstance(gate, Constant):
        for value in gate.values:
            require_range(f"{slot}: constant", value, *_SLOTS[slot])
    if isinstance(gate, Projected):
        require_range(f"{slot}: maximum of sigmoid", gate.maximum, *_SLOTS[slot])


# Outputs: from reads [B, T, H, v] to what the output projection is given.


class Plain(nnx.Module):
    """The reads as they are."""

    def __call__(
        self, reads: Float[Array, "B T H v"], x: Float[Array, "B T d"]
    ) -> Float[Array, "B T H v"]:
        """The reads."""
        return reads

    def boxes(self) -> list[Box]:
        """None: it has no weights."""
        return []


class Norm(nnx.Module):
    """Every head's read normalised, with a scale a head, and optionally gated; see the menu."""

    def __init__(self, config: Sizes, heads: Heads, *, gated: bool | str, rngs: nnx.Rngs):
        self.activation = silu if gated == "silu" else _around_one
        shape, axes = (heads.heads, heads.value_dim), ("embed", "heads", "head_dim")
        self.norm = RMSNorm(shape, axes[1:], dtype=config.dtype)
        self.gate = (
            Linear(
                (config.width,),
                shape,
                axes,
                dtype=config.dtype,
                rngs=rngs,
            )
            if gated
            else nnx.data(None)
        )

    def __call__(
        self, reads: Float[Array, "B T H v"], x: Float[Array, "B T d"]
    ) -> Float[Array, "B T H v"]:
        """The normalised reads, times silu(W x) or 2 sigmoid(W x) if gated."""
        reads = self.norm(reads)
        return reads if self.gate is None else reads * self.activation(self.gate(x))

    def boxes(self) -> list[Box]:
        """The boxes of its weights."""
        return [slow("projections", self.gate), slow("norms", self.norm)]


def plain() -> Maker:
    """The reads as they are."""
    return lambda config, heads, *, rngs: Plain()


def norm() -> Maker:
    """RMSNorm of every head's read."""
    return lambda config, heads, *, rngs: Norm(config, heads, gated=False, rngs=rngs)


def gated_norm(activation: Literal["silu", "sigmoid"] = "silu") -> Maker:
    """RMSNorm of every head's read, times silu(W x), or "sigmoid": 2 sigmoid(W x).

    A random silu(W x) turns half of the reads around. Around one, they are seen from the first step
    on: what a memory stores is then learned in fewer steps.
    """
    return lambda config, heads, *, rngs: Norm(config, heads, gated=activation, rngs=rngs)


def _around_one(x: Array) -> Array:
    return 2.0 * jax.nn.sigmoid(x)


# Starts: the slow parameters of the memory's level, for every head.


class Empty(nnx.Module):
    """A linear memory of zeros, which nothing learns."""

    def __init__(self, config: Sizes, shape: tuple[int, int, int]):
        self.shape, self.dtype = shape, config.dtype

    def __call__(self) -> tuple[Float[Array, "H v k"]]:
        """Zeros for every head."""
        return (jnp.zeros(self.shape, weight_dtype(self.dtype)),)

    def boxes(self) -> list[Box]:
        """None: it has no weights."""
        return []


class Learned(nnx.Module):
    """The initial weights of every head's memory as slow weights."""

    def __init__(self, config: Sizes, heads: Heads, architecture: Architecture, *, rngs: nnx.Rngs):
        dtype = weight_dtype(config.dtype)
        keys = jax.random.split(rngs.params(), heads.heads)
        values = jax.vmap(lambda key: architecture.init(key, dtype))(keys)
        last = len(values) - 1

        def axes(index: int) -> tuple[str, str, str]:
            out = "head_dim" if index == last else "hidden"
            return "heads", out, "head_dim" if index in architecture.inputs else "hidden"

        self.weights = nnx.List(
            [
                param(value, axes(i), matrix=MatrixAxes(-1, -2), weight_decay=False)
                for i, value in enumerate(values)
            ]
        )

    def __call__(self) -> tuple[Float[Array, "H _ _"], ...]:
        """The weights of every head."""
        return tuple(weight(matrix) for matrix in self.weights)

    def boxes(self) -> list[Box]:
        """The box of its weights, which the memory begins from."""
        return [slow("memory starts", self, transfer="init")]


def empty(*, rows: int | None = None) -> Maker:
    """A linear memory of zeros [heads, value_dim, key_dim].

    Args:
      rows: in place of value_dim; None for value_dim.

    Raises:
      ValueError: rows < 1.
    """
    if rows is not None:
        require_range("empty: rows", rows, 1, integer=True)

    def make(config: Sizes, heads: Heads, *, rngs: nnx.Rngs) -> Empty:
        return Empty(config, (heads.heads, rows or heads.value_dim, heads.key_dim))

    return make


def learned(architecture: Architecture) -> Maker:
    """The architecture's random weights, meta-learned: each head's own."""

    def make(config: Sizes, heads: Heads, *, rngs: nnx.Rngs) -> Learned:
        return Learned(config, heads, architecture, rngs=rngs)

    return make


__all__ = [
    "FeatureMap",
    "Heads",
    "Maker",
    "check_slot",
    "constant",
    "elu_plus_one",
    "empty",
    "exponential_decay",
    "gated_norm",
    "identity",
    "learned",
    "norm",
    "plain",
    "scaled",
    "sigmoid",
    "silu",
    "unit",
    "unit_silu",
]
