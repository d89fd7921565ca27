"""Nested Learning in JAX: every level a pure function with its own state and update period."""

from nestedjax import levels
from nestedjax.levels import Level

__all__ = ["Level", "levels"]
