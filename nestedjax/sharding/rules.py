"""The one table from logical axes to mesh axes."""

import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec as P

# Parameters, optimizer state, fast memory states and activations all go through these lines.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # sequences
    "time": ("sequence",),  # tokens of a sequence, where nothing runs along them
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # features of the residual stream
    "heads": ("tensor",),
    "mlp": ("tensor",),  # hidden features of a slow network
    "hidden": ("fsdp",),  # hidden features of a fast memory
    "head_dim": (),
    "layers": (),
    "taps": (),
    "levels": (),
}


def spec_of(
    axes: Sequence[str | None],
    mesh_shape: Mapping[str, int],
    *,
    shape: Sequence[int] | None = None,
    without: Sequence[str] = (),
) -> P:
    """Which mesh axes each dimension of an array is split over.

    A mesh axis splits one dimension of an array at most: the first that asks for it. So activations
    [batch, time, embed] are split by `fsdp` along the batch, and weights [embed, mlp] along embed.

    Args:
      axes: logical name of each dimension; None for one that is never split.
      mesh_shape: devices along each axis of the mesh; axes of size 1 split nothing.
      shape: if given, a dimension that does not divide over its mesh axes is not split.
      without: mesh axes to leave alone.

    Raises:
      ValueError: a logical name that the table does not hold.

    Example:
      >>> tuple(spec_of(["embed", "mlp"], {"data": 1, "fsdp": 4, "tensor": 2}))
      ('fsdp', 'tensor')
    """
    used, spec = set(without), []
    for place, name in enumerate(axes):
        if name is not None and name not in RULES:
            raise ValueError(
                f"no rule for the logical axis {name!r}; add it to nestedjax.sharding.RULES, which "
                f"holds {', '.join(RULES)}"
            )
        wanted = () if name is None else RULES[name]
        chosen = tuple(a for a in wanted if mesh_shape.get(a, 1) > 1 and a not in used)
        if shape is not None and shape[place] % math.prod(mesh_shape[a] for a in chosen):
            chosen = ()
        used.update(chosen)
        spec.append(chosen if len(chosen) > 1 else chosen[0] if chosen else None)
    return P(*spec)
