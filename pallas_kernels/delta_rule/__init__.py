"""The delta-rule recurrence that nearly every memory update reduces to."""

from pallas_kernels.delta_rule.api import delta_chunk, delta_rule
from pallas_kernels.delta_rule.types import DeltaOutput, Operands
from pallas_kernels.delta_rule.xla import (
    Solved,
    Tables,
    chunk_tables,
    read_chunk,
    solve_chunk,
    solve_chunks,
    write_chunk,
)

__all__ = [
    "DeltaOutput",
    "Operands",
    "Solved",
    "Tables",
    "chunk_tables",
    "delta_chunk",
    "delta_rule",
    "read_chunk",
    "solve_chunk",
    "solve_chunks",
    "write_chunk",
]
