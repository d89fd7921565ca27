"""Compiling for TPUs on a machine that has none (needs the `tpu` extra)."""

import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# topology, and the kind of its devices
GENERATIONS = {
    "v4": ("v4:2x2x1", "TPU v4"),
    "v5e": ("v5e:2x2", "TPU v5 lite"),
    "v5p": ("v5p:2x2x1", "TPU v5"),
    "v6e": ("v6e:2x2", "TPU v6 lite"),
    "v7x": ("tpu7x:2x2x1", "TPU7x"),
}
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compiled(function, generation: str, *operands):
    """The program for one chip of a generation; operands are (shape, dtype)."""
    return compiled_tree(function, generation, *(jax.ShapeDtypeStruct(*o) for o in operands))


def compiled_tree(function, generation: str, *operands):
    """The same for trees of shapes."""
    pytest.importorskip("libtpu", reason="needs the tpu extra: make tpu-compile")
    from jax.experimental import topologies

    os.environ.update(ENVIRONMENT)
    name, kind = GENERATIONS[generation]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    assert topology.devices[0].device_kind == kind
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), operands
    )
    return jax.jit(function).lower(*placed).compile()
