"""Compiling for TPUs on a machine that has none (needs the `tpu` extra)."""

import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nestedjax.planning.topology import ENVIRONMENT, TPUS


def compiled(function, generation: str, *operands):
    """The program for one chip of a generation; operands are (shape, dtype)."""
    return compiled_tree(function, generation, *(jax.ShapeDtypeStruct(*o) for o in operands))


def compiled_tree(function, generation: str, *operands):
    """The same for trees of shapes."""
    pytest.importorskip("libtpu", reason="needs the tpu extra: make tpu-compile")
    from jax.experimental import topologies

    os.environ.update(ENVIRONMENT)
    tpu = TPUS[generation]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=tpu.name)
    assert topology.devices[0].device_kind == tpu.kind
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), operands
    )
    return jax.jit(function).lower(*placed).compile()
