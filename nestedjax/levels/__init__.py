"""Levels: the update clock of the whole library."""

from nestedjax.levels.adapt import Adaptation, Adapting, adapt, adaptive_level
from nestedjax.levels.batch import carry_axes, position_of, run_batch, takes_turns
from nestedjax.levels.boundary import at_boundary, resumed
from nestedjax.levels.compose import chain, flow, parallel
from nestedjax.levels.describe import HasBoxes, describe, table
from nestedjax.levels.heads import per_head
from nestedjax.levels.incremental import Unfinished, incremental
from nestedjax.levels.level import SWITCHES, Level, check_switches, due, read_write
from nestedjax.levels.nested import nested
from nestedjax.levels.order import TRANSFERS, Box, order
from nestedjax.levels.run import Carry, misplaced, reset, run, start, stream

__all__ = [
    "SWITCHES",
    "TRANSFERS",
    "Adaptation",
    "Adapting",
    "Box",
    "Carry",
    "HasBoxes",
    "Level",
    "Unfinished",
    "adapt",
    "adaptive_level",
    "at_boundary",
    "carry_axes",
    "chain",
    "check_switches",
    "describe",
    "due",
    "flow",
    "incremental",
    "misplaced",
    "nested",
    "order",
    "parallel",
    "per_head",
    "position_of",
    "read_write",
    "reset",
    "resumed",
    "run",
    "run_batch",
    "start",
    "stream",
    "table",
    "takes_turns",
]
