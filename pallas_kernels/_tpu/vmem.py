"""How much vector memory a kernel may use on each TPU, and whether it rounds its products."""

import math
from typing import Any

import jax

MIB = 2**20
# VMEM by kind of device; a kernel may take seven eighths, the rest is the compiler's.
VMEM = {
    "TPU v4": 16 * MIB,
    "TPU v5 lite": 128 * MIB,
    "TPU v5": 64 * MIB,
    "TPU v6 lite": 128 * MIB,
    "TPU7x": 64 * MIB,
}
ROUNDED = ("TPU v6 lite", "TPU7x")
STORED = 512 * MIB  # of HBM, for the states that a forward pass leaves
MOST = 8  # chunks between two stored states


def vmem_limit_of(kind: str | None = None) -> int:
    """Bytes of VMEM that a kernel may use on a kind of device; the least for an unknown kind."""
    return VMEM.get(kind or device_kind(), min(VMEM.values())) * 7 // 8


def rounds_products(kind: str | None = None) -> bool:
    """Whether a kernel rounds the operands of products itself, where the device would not.

    The default precision of a float32 product is one pass of bfloat16 up to v5; a later device
    takes as many passes as float32 needs.
    """
    return (kind or device_kind()) in ROUNDED


def device_kind() -> str:
    """The kind of device that is compiled for: the abstract mesh's, if there is one, or ours."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.devices()[0].device_kind if device is None else device.device_kind


def save_every(state: Any, chunks: int, spare: int) -> int:
    """Chunks between two stored states: as many states as VMEM has room for, at most 8.

    Args:
      state: a tree of [S, ..., m, n]; a kernel holds that of one sequence.
      chunks: of a sequence; the result divides it.
      spare: bytes of VMEM for the starts of the chunks between.
    """
    most = max(1, min(MOST, spare // state_bytes(state)))
    return next(k for k in range(most, 0, -1) if chunks % k == 0)


def least_every(state: Any, chunks: int) -> int:
    """The fewest chunks between two stored states for which these fit in `STORED` bytes."""
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    allowed = [k for k in range(1, chunks + 1) if chunks % k == 0 and chunks // k * one <= STORED]
    return allowed[0] if allowed else chunks


def state_bytes(state: Any) -> int:
    """Bytes of VMEM that one sequence's part of a tree of [S, ..., m, n] takes."""
    return sum(padded_bytes(leaf.shape[1:]) for leaf in jax.tree.leaves(state))


def padded_bytes(shape: tuple[int, ...], itemsize: int = 4) -> int:
    """Bytes of VMEM that an array takes, in tiles of 8 x 128 words."""
    *lead, rows, columns = shape
    sublanes = 32 // itemsize
    tiles = -(-rows // sublanes) * -(-columns // 128)
    return math.prod(lead) * tiles * sublanes * 128 * itemsize
