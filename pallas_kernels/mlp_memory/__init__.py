"""Deep memories that learn in context: HOPE's hot loop, Titans' and TTT's."""

from pallas_kernels.mlp_memory.anchor import predict
from pallas_kernels.mlp_memory.api import (
    CHOICES,
    MemoryOutput,
    check_kernel,
    check_rule,
    mlp_memory,
)
from pallas_kernels.mlp_memory.chunk import write_chunk
from pallas_kernels.mlp_memory.context import generate, memory_chunk
from pallas_kernels.mlp_memory.token import read_anchor, read_running, running_start
from pallas_kernels.mlp_memory.types import (
    Documents,
    FastWeights,
    Readout,
    Reads,
    Rule,
    Tokens,
    Written,
)
from pallas_kernels.mlp_memory.xla import recomputed

__all__ = [
    "CHOICES",
    "Documents",
    "FastWeights",
    "MemoryOutput",
    "Readout",
    "Reads",
    "Rule",
    "Tokens",
    "Written",
    "check_kernel",
    "check_rule",
    "generate",
    "memory_chunk",
    "mlp_memory",
    "predict",
    "read_anchor",
    "read_running",
    "recomputed",
    "running_start",
    "write_chunk",
]
