"""Which weights of a model are matrices: what its matrix optimizers orthogonalise or precondition.

Decided by the logical names of a weight's axes. "layers" in front is always a stack.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nestedjax.models.layers import Linear
from nestedjax.optim import MatrixAxes

PyTree = Any

# Names of a layer's axes -> which are contracted with its input, and which it produces. Heads of a
# slow projection are part of its matrix; heads of a memory are matrices of their own.
MATRICES: dict[tuple[str | None, ...], Any] = {
    ("embed", "mlp"): MatrixAxes(-2, -1),
    ("mlp", "embed"): MatrixAxes(-2, -1),
    ("embed", "heads", "head_dim"): MatrixAxes(-3, (-2, -1)),
    ("heads", "head_dim", "embed"): MatrixAxes((-3, -2), -1),
    ("heads", "hidden", "head_dim"): MatrixAxes(-1, -2),
    ("heads", "head_dim", "hidden"): MatrixAxes(-1, -2),
}

# No matrices: embedding and head, convolution taps, gates with one output a head, vectors a head.
ELEMENTWISE: set[tuple[str | None, ...]] = {
    ("vocab", "embed"),
    ("taps", "embed"),
    ("embed", "heads"),
    ("heads", "head_dim"),
    (None, None),  # a tap
}


def matrix_axes(model: Any) -> PyTree:
    """The `axes` argument of the optimizers in `nestedjax.optim`, and of `optax.contrib.muon`.

    Args:
      model: a model, abstract or not, or `nnx.state(model, nnx.Param)`.

    Returns:
      A tree like the parameters, with `optim.MatrixAxes` for a weight that is a matrix (or a stack
      of them) and None for one that is not.

    Raises:
      ValueError: a weight whose axes no line of this file knows, by name.

    Example:
      >>> from flax import nnx
      >>> from nestedjax import models
      >>> model = nnx.eval_shape(lambda: models.build("transformer_nano", rngs=nnx.Rngs(0)))
      >>> models.matrix_axes(model)["blocks"]["mlp"]["wi"]["kernel"].output_axis
      -1
    """
    params = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model

    def one(path: Any, weight: nnx.Param) -> Any:
        names = _names(weight)
        if len(names) < 2 or names in ELEMENTWISE:
            return None
        if names not in MATRICES:
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"weight {where!r} has axes {names}, of which nestedjax/models/matrices.py does not"
                " say whether they are a matrix: add them there"
            )
        return MATRICES[names]

    return jax.tree.map_with_path(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


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
      >>> from flax import nnx
      >>> from nestedjax import models
      >>> make = lambda: models.add_taps(models.build("transformer_nano", rngs=nnx.Rngs(0)))
      >>> nnx.eval_shape(make).blocks.mlp.wo.tap.shape
      (3, 272, 272)
    """
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, Linear) and _names(layer.kernel) in MATRICES:
            shape, stack = layer.kernel.shape, layer.kernel.get_metadata("axes")[0] == "layers"
            size = math.prod(shape[stack : stack + layer.contracted])
            value = jnp.zeros((*shape[:stack], size, size), layer.kernel.dtype)
            layer.tap = nnx.Param(value, axes=(*["layers"] * stack, None, None))
    return model


def _names(weight: nnx.Param) -> tuple[str | None, ...]:
    return tuple(name for name in weight.get_metadata("axes") if name != "layers")
