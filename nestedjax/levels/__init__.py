"""Levels: the update clock of the whole library."""

from nestedjax.levels.level import Level

__all__ = ["Level"]
