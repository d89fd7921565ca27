"""Nested Learning in JAX: every level a pure function with its own state and update period.

import nestedjax as nj

run = nj.run_preset("hope_nano", {"memory.chunk_size": 16}, steps=200)
nj.train(run, "runs/first")
trained = nj.load("runs/first")
print(nj.generate(trained, "ROMEO:"), nj.evaluate(trained, "book.txt").loss)
"""

import importlib
from typing import TYPE_CHECKING, Any

from nestedjax.version import __version__

if TYPE_CHECKING:
    from nestedjax import (
        checkpoint,
        data,
        evaluation,
        layers,
        levels,
        memory,
        models,
        optim,
        sharding,
    )
    from nestedjax.run import evaluate, generate, load, run_preset, train

__all__ = [
    "__version__",
    "checkpoint",
    "data",
    "evaluate",
    "evaluation",
    "generate",
    "layers",
    "levels",
    "load",
    "memory",
    "models",
    "optim",
    "run_preset",
    "sharding",
    "train",
]

_FUNCTIONS = ("evaluate", "generate", "load", "run_preset", "train")


def __getattr__(name: str) -> Any:
    # On first use: JAX and flax take seconds to import, which `nestedjax --help` need not pay.
    if name in _FUNCTIONS:
        return getattr(importlib.import_module("nestedjax.run"), name)
    if name in __all__:
        return importlib.import_module(f"nestedjax.{name}")
    raise AttributeError(f"module 'nestedjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
