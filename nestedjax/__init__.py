"""Nested Learning in JAX: every level a pure function with its own state and update period."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestedjax import data, layers, levels, memory, models, optim, training
    from nestedjax.levels import Level

__all__ = ["Level", "data", "levels", "memory", "layers", "models", "optim", "training"]


def __getattr__(name: str) -> Any:
    # On first use: JAX and flax take seconds to import, which `nestedjax --help` need not pay.
    if name == "Level":
        return importlib.import_module("nestedjax.levels").Level
    if name in __all__:
        return importlib.import_module(f"nestedjax.{name}")
    raise AttributeError(f"module 'nestedjax' has no attribute {name!r}")
