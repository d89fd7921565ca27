"""Levels: the update clock of the whole library."""

from nestedjax.levels.adapt import Adaptation, Adapting, adapt, adaptive_level
from nestedjax.levels.boundary import at_boundary, batch_axes, resumed
from nestedjax.levels.compose import chain, flow, parallel
from nestedjax.levels.describe import HasBoxes, describe, table
from nestedjax.levels.heads import per_head
from nestedjax.levels.level import Level, due, read_write
from nestedjax.levels.nested import nested
from nestedjax.levels.order import TRANSFERS, Box, order
from nestedjax.levels.run import Carry, reset, run, start, stream

__all__ = [
    "TRANSFERS",
    "Adaptation",
    "Adapting",
    "Box",
    "Carry",
    "HasBoxes",
    "Level",
    "adapt",
    "adaptive_level",
    "at_boundary",
    "batch_axes",
    "chain",
    "describe",
    "due",
    "flow",
    "nested",
    "order",
    "parallel",
    "per_head",
    "read_write",
    "reset",
    "resumed",
    "run",
    "start",
    "stream",
    "table",
]
