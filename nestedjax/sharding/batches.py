"""Batches and state on the devices of a mesh, or on one device where there is none."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nestedjax.sharding.placement import check_fits

PyTree = Any


def mesh_of(batch: NamedSharding | None) -> AbstractContextManager:
    """The context in which a run with batches on this mesh computes."""
    if batch is None:
        return nullcontext()
    assert isinstance(batch.mesh, Mesh)
    return jax.set_mesh(batch.mesh)


def on_mesh(state: PyTree, sharding: NamedSharding | None) -> PyTree:
    """The state with each leaf on the mesh of `sharding`; leaves not there yet are replicated."""
    if sharding is None:
        return state
    mesh = sharding.mesh

    def put(leaf):
        there = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if there else jax.device_put(leaf, NamedSharding(mesh, P()))

    return jax.tree.map(put, state)


def batch_placer(sharding: NamedSharding | None) -> Callable[[PyTree], PyTree]:
    """`place(batch)`: this process's rows to the global batch [B, ...]."""
    return lambda batch: jax.tree.map(lambda x: _put(np.asarray(x), sharding, 0), batch)


def group_placer(
    microbatches: int, sharding: NamedSharding | None
) -> Callable[[Sequence[PyTree]], PyTree]:
    """`place(batches)`: K batches to arrays [K, M, B / M, ...] of M microbatches.

    Rows are divided here, on the host, because a reshape of a sharded axis would move data.

    Raises (in `place`):
      ValueError: the batch does not divide.
    """

    def stack(*parts):
        rows = parts[0].shape[0]
        if rows % microbatches:
            raise ValueError(
                f"a batch of {rows} rows does not divide into microbatches={microbatches}; "
                "change batch or microbatches"
            )
        stacked = np.stack(parts)
        shape = len(parts), microbatches, rows // microbatches, *stacked.shape[2:]
        return _put(stacked.reshape(shape), sharding, 2)

    return lambda batches: jax.tree.map(stack, *batches)


def _put(x: np.ndarray, sharding: NamedSharding | None, leading: int) -> Any:
    if sharding is None:
        return jnp.asarray(x)
    placed = NamedSharding(sharding.mesh, P(*[None] * leading, *sharding.spec))
    shape = list(x.shape)
    shape[leading] *= jax.process_count()
    names = [*[None] * leading, "batch", "length", *[None] * x.ndim]
    check_fits(shape, placed, name="a microbatch" if leading else "a batch", axes=names)
    return jax.make_array_from_process_local_data(placed, x)
