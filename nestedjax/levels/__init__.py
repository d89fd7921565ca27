"""Levels: the update clock of the whole library."""

from nestedjax.levels.compose import chain, flow, parallel
from nestedjax.levels.level import Level, read_write
from nestedjax.levels.run import Carry, batch_axes, reset, run, start, stream

__all__ = [
    "Carry",
    "Level",
    "batch_axes",
    "chain",
    "flow",
    "parallel",
    "read_write",
    "reset",
    "run",
    "start",
    "stream",
]
