"""How much of a TPU core's vector memory a kernel may take."""

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
