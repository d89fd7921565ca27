"""What the weights of a model say of themselves, as trees that optimizers take."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nestedjax.layers import Linear, is_param, param, per_weight

PyTree = Any


def matrix_axes(model: Any) -> PyTree:
    """The `axes` argument of the optimizers in `nestedjax.optim`, and of `optax.contrib.muon`.

    Args:
      model: a model, abstract or not, or `nnx.state(model, nnx.Param)`.

    Returns:
      A tree like the parameters, with `optim.MatrixAxes` for a weight that is a matrix (or a stack
      of them) and None for one that is not, as each said where it was made (`layers.param`).

    Example:
      >>> from nestedjax import models
      >>> model = models.abstract(lambda: models.create("transformer_nano"))
      >>> models.matrix_axes(model)["blocks"][0]["feed_forward"]["network"]["wi"]["kernel"]
      MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    """
    params = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model
    return jax.tree.map(lambda weight: weight.get_metadata("matrix"), params, is_leaf=is_param)


def weight_decays(params: PyTree) -> PyTree:
    """Whether weight decay pulls each weight to zero: the `mask` of `optax.add_decayed_weights`.

    Args:
      params: `nnx.state(model, nnx.Param)`, or a tree of the same weights with other values.
    """
    return per_weight(lambda weight: weight.get_metadata("weight_decay"), params)


def add_taps(model: Any) -> Any:
    """Give every linear layer that is a matrix a tap, which delta gradient descent needs.

    Adds the zero parameter "tap" [di, di] beside each "kernel"; see `nestedjax.optim.taps`. What
    the model computes does not change, nor do the taps: their gradients are `X^T X / n` of the
    layers' inputs. Embeddings have none.

    Args:
      model: changed in place.

    Returns:
      The model.

    Example:
      >>> from nestedjax import models
      >>> model = models.abstract(lambda: models.add_taps(models.create("transformer_nano")))
      >>> model.blocks[0].feed_forward.network.wo.tap.shape
      (3, 272, 272)
    """
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, Linear) and layer.kernel.get_metadata("matrix") is not None:
            shape, stack = layer.kernel.shape, layer.kernel.get_metadata("axes")[0] == "layers"
            size = math.prod(shape[stack : stack + layer.contracted])
            value = jnp.zeros((*shape[:stack], size, size), layer.kernel.dtype)
            axes = (*["layers"] * stack, None, None)
            layer.tap = param(value, axes, matrix=None, weight_decay=False)
            # stepped with its kernel: the optimizer of a group needs both
            layer.tap.set_metadata(group=layer.kernel.get_metadata("group"))
    return model
