"""Levels: the update clock of the whole library."""

from nestedjax.levels.adapt import Adaptation, Adapting, adapt, adaptive_level
from nestedjax.levels.compose import chain, flow, parallel
from nestedjax.levels.level import Level, read_write
from nestedjax.levels.nested import nested
from nestedjax.levels.run import Carry, batch_axes, reset, run, start, stream

__all__ = [
    "Adaptation",
    "Adapting",
    "Carry",
    "Level",
    "adapt",
    "adaptive_level",
    "batch_axes",
    "chain",
    "flow",
    "nested",
    "parallel",
    "read_write",
    "reset",
    "run",
    "start",
    "stream",
]
