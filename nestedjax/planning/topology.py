"""Compiling for TPUs on a machine that has none (needs the `tpu` extra)."""

from collections.abc import Callable
from typing import Any, NamedTuple

# Of the process that compiles, so that libtpu does not look for a TPU.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """The smallest slice of one generation of TPUs.

    Attributes:
      name: of the slice, as `jax.experimental.topologies` takes it.
      kind: `device_kind` of its devices.
    """

    name: str
    kind: str


TPUS = {
    "v4": Topology("v4:2x2x1", "TPU v4"),
    "v5e": Topology("v5e:2x2", "TPU v5 lite"),
    "v5p": Topology("v5p:2x2x1", "TPU v5"),
    "v6e": Topology("v6e:2x2", "TPU v6 lite"),
    "v7x": Topology("tpu7x:2x2x1", "TPU7x"),
}


def compiled_for(topology: Topology, function: Callable, *operands: Any) -> tuple[Any, Any]:
    """Compile a function for one chip ahead of time.

    Args:
      topology: an entry of `TPUS`.
      function: of arrays.
      operands: trees of arrays or of their shapes.

    Returns:
      `(compiled, results)`: the program, and the shapes of what it returns.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    mesh = Mesh(np.array(found.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), operands
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask what they are for
        lowered = jax.jit(function).lower(*placed)
        return lowered.compile(), lowered.out_info
