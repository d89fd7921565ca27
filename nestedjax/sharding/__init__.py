"""Where arrays live: mesh axes, one table of logical axes, placements and constraints."""

from nestedjax.sharding.activations import (
    constrain,
    contract,
    each_device,
    gathered,
    lookup,
    over_batch,
)
from nestedjax.sharding.batches import batch_placer, group_placer, mesh_of, on_mesh
from nestedjax.sharding.errors import MeshError
from nestedjax.sharding.mesh import AXES, make_mesh
from nestedjax.sharding.placement import (
    batch_sharding,
    check_fits,
    like_params,
    place,
    replicated,
    shardings_of,
)
from nestedjax.sharding.rules import RULES, spec_of

__all__ = [
    "AXES",
    "RULES",
    "MeshError",
    "batch_placer",
    "batch_sharding",
    "check_fits",
    "constrain",
    "contract",
    "each_device",
    "gathered",
    "group_placer",
    "like_params",
    "lookup",
    "make_mesh",
    "mesh_of",
    "on_mesh",
    "over_batch",
    "place",
    "replicated",
    "shardings_of",
    "spec_of",
]
