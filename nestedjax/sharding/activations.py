"""Shardings inside a computation: the same lines on an Explicit mesh, an Auto mesh and none.

The mesh is the one of `jax.set_mesh`. Without it, and inside `jax.shard_map`, every function here
is the plain operation. On an Auto mesh `constrain` and `gathered` guide the compiler; on an
Explicit mesh they change the type, and `contract` and `lookup` say how their result is split, which
JAX does not infer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from nestedjax.sharding.rules import spec_of

PyTree = Any


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """The same array, split over the mesh by the logical names of its dimensions.

    A dimension that does not divide over its mesh axes (one sampled sequence on a mesh for many) is
    not split: that costs time and changes no value. Weights and batches are refused instead, when
    they are placed.

    Example:
      >>> import jax.numpy as jnp
      >>> constrain(jnp.ones((2, 3)), "batch", "embed").shape
      (2, 3)
    """
    mesh = _mesh()
    if mesh is None:
        return x
    return _move(x, spec_of(axes, mesh.shape, shape=x.shape), mesh)


def over_batch(tree: PyTree) -> PyTree:
    """Split the first dimension of every leaf like a batch and leave the others as they lie."""
    mesh = _mesh()
    if mesh is None:
        return tree

    def one(x):
        first = spec_of(("batch",), mesh.shape, shape=x.shape)
        rest = _spec(x)[1:] if _explicit(mesh) else [P.UNCONSTRAINED] * (x.ndim - 1)
        return _move(x, P(*first, *rest), mesh)

    return jax.tree.map(one, tree)


def gathered(weight: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Gather a weight over `fsdp` for its use, since `fsdp` splits the batch there.

    Along all other mesh axes it stays split as it is stored.

    Args:
      weight: stored by the rule table.
      axes: logical name of each dimension; names in front of them (layers scanned over) are left
        out.
    """
    mesh = _mesh()
    if mesh is None:
        return weight
    names = axes[len(axes) - weight.ndim :]
    return _move(weight, spec_of(names, mesh.shape, shape=weight.shape, without=("fsdp",)), mesh)


def contract(x: jax.Array, kernel: jax.Array, count: int) -> jax.Array:
    """`jnp.tensordot(x, kernel, count)`; sums over a split dimension are added over the devices."""
    out = None
    if _explicit(_mesh()):
        out = P(*_spec(x)[: x.ndim - count], *_spec(kernel)[count:])
    return jnp.tensordot(x, kernel, axes=count, out_sharding=out)


def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]` for in-range integers, split like `index` in front and like a row behind."""
    if not _explicit(_mesh()):
        return jnp.take(table, index, axis=0)
    return table.at[index].get(out_sharding=P(*_spec(index), *_spec(table)[1:]))


def each_device(
    function: Callable[..., Any], args: tuple[PyTree, ...], axes: PyTree, out_axes: PyTree
) -> Any:
    """Run `function` on each device's own share of the arrays: the compiler splits no kernel.

    Args:
      function: of arrays, the same for every sequence and head.
      args: what it is given.
      axes: a tree prefix of `args` with a `PartitionSpec` of logical names at each part.
      out_axes: the same for the results; their dimensions are split as those of `args` are.
    """
    mesh = _mesh()
    if mesh is None:
        return function(*args)
    split: dict[str | None, Any] = {None: None}

    def spec(names, x):
        found = spec_of(tuple(names), mesh.shape, shape=x.shape[: len(names)])
        split.update(zip(names, found, strict=True))
        return found

    def is_names(node):
        return isinstance(node, P)

    specs = jax.tree.map(
        lambda names, part: jax.tree.map(lambda x: spec(names, x), part),
        axes,
        args,
        is_leaf=is_names,
    )
    out_specs = jax.tree.map(
        lambda names: P(*(split[n] for n in names)), out_axes, is_leaf=is_names
    )
    args = jax.tree.map(lambda x, s: _move(x, s, mesh), args, specs)
    run = jax.shard_map(function, in_specs=specs, out_specs=out_specs, check_vma=False)
    return run(*args)


def _mesh():
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def _explicit(mesh) -> bool:
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def _spec(x: jax.Array) -> tuple:
    spec = jax.typeof(x).sharding.spec
    return (*spec, *[None] * (x.ndim - len(spec)))


def _move(x, spec, mesh):
    if _explicit(mesh):
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)
