"""Slow weights: a value, and all that the rest of the library needs to know about it.

A weight says at its creation what it is: the logical names of its axes, whether it is a matrix for
the optimizers that treat matrices apart, and whether weight decay pulls at it. Sharding, optimizers
and decay masks read that and nothing else.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from nestedjax.optim import MatrixAxes
from nestedjax.sharding import gathered
from pallas_kernels import accumulation_dtype

PyTree = Any


@runtime_checkable
class Sizes(Protocol):
    """What every layer asks of a model's configuration; see `nestedjax.models.ModelConfig`."""

    @property
    def width(self) -> int:
        """Features of the residual stream."""
        ...

    @property
    def layers(self) -> int:
        """Blocks of the model."""
        ...

    @property
    def dtype(self) -> str:
        """What activations are computed in."""
        ...

    @property
    def remat(self) -> str:
        """What the backward pass recomputes."""
        ...

    @property
    def implementation(self) -> str:
        """How memories run over the whole chunks of a call."""
        ...

    @property
    def writes(self) -> bool:
        """Whether memories are written in context."""
        ...


def weight_dtype(dtype: str) -> jnp.dtype:
    """The dtype in which weights and memories of a model computing in `dtype` are kept."""
    return accumulation_dtype(jnp.dtype(dtype))


def param(
    value: Array, axes: Sequence[str | None], *, matrix: MatrixAxes | None, weight_decay: bool
) -> nnx.Param:
    """A slow weight.

    Args:
      value: its initial value.
      axes: logical name of each dimension, as `nestedjax.sharding.RULES` knows them.
      matrix: which axes are contracted with the layer's input and which are produced, counted from
        the end (`MatrixAxes(-2, -1)` for `y = x @ value`); all others are stacks of matrices. None
        for what is no matrix: embeddings, convolution taps, gates, scales, biases.
      weight_decay: whether decoupled weight decay pulls it to zero: projections and embeddings do,
        norms, biases, convolutions (the identity at the start) and starts of memories do not.

    Raises:
      ValueError: the number of axis names is not that of the dimensions.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import layers, optim
      >>> matrix = optim.MatrixAxes(-2, -1)
      >>> kernel = layers.param(
      ...     jnp.zeros((8, 4)), ("embed", "mlp"), matrix=matrix, weight_decay=True)
      >>> kernel.get_metadata("axes")
      ('embed', 'mlp')
    """
    if value.ndim != len(axes):
        raise ValueError(
            f"a weight of shape {value.shape} needs {value.ndim} axis names, got {tuple(axes)}"
        )
    return nnx.Param(value, axes=tuple(axes), matrix=matrix, weight_decay=weight_decay, group="")


def weight(param: nnx.Param, dtype: Any = None) -> Array:
    """The value of a slow weight as a layer uses it: cast, and gathered where it lies in parts.

    Args:
      param: made by `param`; inside a scan over layers without its first axis.
      dtype: what to cast to; default its own.
    """
    value = param[...]
    return gathered(value.astype(dtype or value.dtype), param.get_metadata("axes"))


def grouped(module: nnx.Module, group: str) -> None:
    """Say of every weight in a module which optimizer group steps it ("": at every step).

    The groups of a model and their periods are `nestedjax.models.periods(config)`.
    """
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            node.set_metadata(group=group)


def is_param(leaf: Any) -> bool:
    """Whether a node of a tree is a slow weight: the `is_leaf` of a map over whole weights."""
    return isinstance(leaf, nnx.Param)


def per_weight(function: Any, params: PyTree) -> PyTree:
    """`function(weight)` for every slow weight of a tree, in place of each of its arrays.

    The result has the structure of the tree, so that it fits where optax takes labels or masks.
    """

    def one(leaf: Any) -> Any:
        value = function(leaf)
        return jax.tree.map(lambda _: value, leaf)

    return jax.tree.map(one, params, is_leaf=is_param)


def residual_scale(layers: int) -> float:
    """Factor on the initial output projection of every residual branch of `layers` blocks."""
    return 1.0 / math.sqrt(2 * layers)


def head_dim(width: int, heads: int) -> int:
    """Features of each of `heads` equal heads.

    Raises:
      ValueError: the width does not divide.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"heads={heads} do not divide width={width}; change either")
    return width // heads
