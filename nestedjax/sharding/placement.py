"""Placing whole trees: parameters, what an optimizer keeps for each of them, batches."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nestedjax.sharding.errors import MeshError
from nestedjax.sharding.rules import spec_of

PyTree = Any


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batches [B, T]: rows over `data` and `fsdp`, tokens over `sequence`.

    Raises:
      MeshError: `tensor` or `sequence` reaches over processes. Each process reads rows of its own,
        so no two of them may need the same row.
    """
    rows: dict[int, set] = {}
    for place, device in np.ndenumerate(mesh.devices):
        rows.setdefault(device.process_index, set()).add(place[:2])
    if sum(map(len, rows.values())) > mesh.shape["data"] * mesh.shape["fsdp"]:
        raise MeshError(
            f"mesh {_text(mesh)} needs the same rows of a batch in several of {len(rows)} processes"
            "; keep tensor * sequence within the devices of one process"
        )
    return NamedSharding(mesh, spec_of(("batch", "time"), mesh.shape))


def shardings_of(tree: PyTree, axes: PyTree, mesh: Mesh) -> PyTree:
    """A `NamedSharding` for each leaf, by the rule table.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      axes: the same structure; each leaf a `PartitionSpec` of the logical names of its dimensions.
      mesh: from `make_mesh`.

    Raises:
      MeshError: a dimension does not divide over its mesh axes; nothing is replicated in silence.
      ValueError: a logical name without a rule.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import sharding
      >>> mesh = sharding.make_mesh("data=1", devices=jax.devices()[:1])
      >>> tuple(sharding.shardings_of(jnp.ones((4, 2)), P("embed", "mlp"), mesh).spec)
      (None, None)
    """

    def one(path, leaf, names):
        names = tuple(names)
        found = NamedSharding(mesh, spec_of(names, mesh.shape))
        check_fits(leaf.shape, found, name=f"weight {_name(path)}", axes=names)
        return found

    return jax.tree_util.tree_map_with_path(one, tree, axes)


def like_params(tree: PyTree, params: PyTree, shardings: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of what is kept for parameters: moments, momenta, averages, accumulated gradients.

    A leaf whose path ends with the whole path of a parameter, and which has its shape, lies where
    the parameter lies. Everything else (counters, factored moments) is replicated. This asks
    nothing of the optimizer but that its trees are shaped like the parameters', masked or not.

    Args:
      tree: an optimizer's state, or its shapes.
      params: the parameters, or their shapes.
      shardings: of the parameters, from `shardings_of`.
      mesh: where the rest is replicated.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    placed = dict(zip([path for path, _ in named], jax.tree.leaves(shardings), strict=True))
    shapes = {path: leaf.shape for path, leaf in named}

    def one(path, leaf):
        for start in range(len(path)):  # the longest ending first
            if shapes.get(path[start:]) == leaf.shape:
                return placed[path[start:]]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Put a tree on the devices of its shardings; every process passes the same whole tree."""
    return jax.device_put(tree, shardings)


def check_fits(
    shape: Sequence[int],
    sharding: NamedSharding,
    *,
    name: str,
    axes: Sequence[str | None] | None = None,
) -> None:
    """Refuse an array that does not divide over the devices.

    Args:
      shape: of the array.
      sharding: the one that the array is to have.
      name: what the error message calls it.
      axes: logical names of its dimensions.

    Raises:
      MeshError: a dimension does not divide; the message has the sizes and the fix.
    """
    for index, split in enumerate(sharding.spec):
        split = split if isinstance(split, tuple) else () if split is None else (split,)
        parts = math.prod(sharding.mesh.shape[axis] for axis in split)
        if shape[index] % parts:
            what = axes[index] if axes is not None else f"dimension {index}"
            over = " * ".join(f"{axis}={sharding.mesh.shape[axis]}" for axis in split)
            raise MeshError(
                f"{name} has {what}={shape[index]}, which does not divide over the mesh's {over}; "
                f"make it a multiple of {parts}, or use another mesh"
            )


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _text(mesh: Mesh) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
