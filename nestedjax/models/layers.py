"""The small layers that every model shares: projections, norms, embedding, convolution, MLPs.

Weights are kept in at least float32 and cast to the layer's `dtype` where they are used. Every
weight carries the logical names of its axes as metadata (`param.get_metadata("axes")`), which the
rule table of `nestedjax.sharding` maps to mesh axes.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nestedjax.optim import watch_inputs
from nestedjax.sharding import constrain, contract, gathered, lookup
from pallas_kernels import accumulation_dtype

INIT_STD = 0.02


def weight_dtype(dtype: str) -> jnp.dtype:
    """The dtype in which weights and memories of a model computing in `dtype` are kept."""
    return accumulation_dtype(jnp.dtype(dtype))


def param(value: Array, *axes: str) -> nnx.Param:
    """A slow weight with the logical name of each of its axes."""
    if value.ndim != len(axes):
        raise ValueError(f"A weight of shape {value.shape} needs {value.ndim} axis names: {axes}.")
    return nnx.Param(value, axes=axes)


def weight(param: nnx.Param, dtype: Any = None) -> Array:
    """The value of a slow weight as a layer uses it: cast, and gathered where it lies in parts.

    Args:
      param: made by `param`; inside a scan over layers without its first axis.
      dtype: what to cast to; default its own.
    """
    value = param[...]
    return gathered(value.astype(dtype or value.dtype), param.get_metadata("axes"))


class Linear(nnx.Module):
    """A linear map without bias between any groups of axes: `y = x . kernel`.

    Args:
      inputs: sizes of the trailing axes of x that are contracted.
      outputs: sizes of the axes that replace them.
      axes: logical names of the inputs' and then the outputs' axes.
      scale: the kernel is drawn from normal(0, 0.02 * scale).
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
    ):
        shape = (*inputs, *outputs)
        value = jax.random.normal(rngs.params(), shape, weight_dtype(dtype))
        self.kernel = param(value * (INIT_STD * scale), *axes)
        self.contracted = len(inputs)
        self.dtype = dtype
        self.tap: nnx.Param | None = nnx.data(None)  # see models.add_taps

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Map the last axes of x [..., *inputs] to [..., *outputs]."""
        if self.tap is not None:
            x = watch_inputs(x, self.tap[...], contracted=self.contracted)
        return contract(x.astype(self.dtype), weight(self.kernel, self.dtype), self.contracted)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation of the last axis (eps 1e-6), with a learned scale.

    Args:
      shape: sizes of the trailing axes that the scale covers; only the last one is normalised.
      axes: their logical names.
      dtype: dtype of the result; the statistics are computed in at least float32.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[str], *, dtype: str):
        self.scale = param(jnp.ones(tuple(shape), weight_dtype(dtype)), *axes)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalise x [..., *shape]."""
        scale = weight(self.scale)
        wide = x.astype(scale.dtype)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - scale.ndim)))
        return (wide * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(self.dtype)


class Embed(nnx.Module):
    """A token embedding that also is the output head (`attend`).

    The table is drawn from normal(0, 0.02). `attend` divides by 0.02 * width, so that with a
    normalised input of any width the first logits are near 0 and the first loss is ln(vocab).
    """

    def __init__(self, vocab: int, width: int, *, dtype: str, rngs: nnx.Rngs):
        value = jax.random.normal(rngs.params(), (vocab, width), weight_dtype(dtype))
        self.embedding = param(value * INIT_STD, "vocab", "embed")
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B d"]:
        """The rows of the table that `tokens` name."""
        return lookup(weight(self.embedding, self.dtype), tokens)

    def attend(self, hidden: Float[Array, "*B d"]) -> Float[Array, "*B V"]:
        """Logits in at least float32: the scaled product with every row of the table."""
        wide = self.embedding.dtype
        table = weight(self.embedding, self.dtype)
        scale = 1.0 / (INIT_STD * table.shape[1])
        return jnp.einsum(
            "...d,vd->...v",
            hidden.astype(self.dtype),
            table,
            preferred_element_type=wide,
        ) * jnp.asarray(scale, wide)


class CausalConv(nnx.Module):
    """A causal depthwise convolution over time, the identity at initialisation.

    y_t = sum_j kernel[width - 1 - j] * x_{t-j}, over the inputs of token t's own document only. Its
    state holds the last width - 1 inputs (zeros before the document's start).
    """

    def __init__(self, width: int, features: int, *, dtype: str):
        taps = jnp.zeros((width, features), weight_dtype(dtype)).at[-1].set(1.0)
        self.kernel = param(taps, "taps", "embed")
        self.dtype = dtype

    def init_state(self, batch: int) -> Float[Array, "B w d"]:
        """The state at the start of a context."""
        width, features = self.kernel.shape
        return constrain(jnp.zeros((batch, width - 1, features), self.dtype), "batch", None, None)

    def __call__(
        self,
        x: Float[Array, "B T d"],
        state: Float[Array, "B w d"],
        *,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T d"], Float[Array, "B w d"]]:
        """Convolve T more tokens; `resets` marks the first token of each new document."""
        kernel = weight(self.kernel, self.dtype)
        past, length = kernel.shape[0] - 1, x.shape[1]
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
                term = jnp.where(same[..., None], term, 0.0)
            y = y + term * kernel[tap][None, None]
        last = inputs[:, length:]
        if document is not None:
            same = document[:, length:] == document[:, -1:]
            last = jnp.where(same[..., None], last, 0.0)
        return y, last


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


def residual_scale(layers: int) -> float:
    """Factor on the initial output projection of every residual branch of `layers` blocks."""
    return 1.0 / math.sqrt(2 * layers)
