"""How much of a TPU core's vector memory a kernel may take."""

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


def vmem_limit_of(kind: str | None = None) -> int:
    """Bytes of VMEM that a kernel may use on a kind of device; of an unknown one the least."""
    kind = jax.devices()[0].device_kind if kind is None else kind
    return VMEM.get(kind, min(VMEM.values())) * 7 // 8


def save_every(state: Any, chunks: int, vmem_limit: int) -> int:
    """Chunks between two stored states: as many states as an eighth of the VMEM holds, at most 8.

    Of what is left after 12 MiB for the values of a chunk.

    Args:
      state: a tree of [S, ..., m, n]; a kernel holds that of one sequence.
      chunks: of a sequence; the result divides it.
      vmem_limit: bytes.
    """
    bytes_of_one = state_bytes(state)
    most = max(1, min(8, (vmem_limit - 12 * MIB) // 8 // bytes_of_one))
    return next(k for k in range(most, 0, -1) if chunks % k == 0)


def state_bytes(state: Any) -> int:
    """Bytes of VMEM that one sequence's part of a tree of [S, ..., m, n] takes."""
    return sum(_padded_bytes(leaf.shape[1:]) for leaf in jax.tree.leaves(state))


def _padded_bytes(shape: tuple[int, ...]) -> int:
    """Of float32 in tiles of 8 x 128."""
    *lead, rows, columns = shape
    return 4 * math.prod(lead) * -(-rows // 8) * 8 * -(-columns // 128) * 128
