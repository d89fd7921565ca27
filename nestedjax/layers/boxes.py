"""Helpers for the `boxes()` of the models: sizes of weights and states, boxes of slow weights.

Boxes count every layer: weights and states carry the layer axis. Same-named boxes are one.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from flax import nnx

from nestedjax.levels import Box
from nestedjax.levels.describe import count, size

PyTree = Any


def slow(
    name: str, *modules: nnx.Module | None, state: PyTree = (), transfer: str = "param"
) -> Box:
    """The box of weights that only the outer optimizer writes.

    Args:
      name: of the box.
      *modules: whose weights it holds; None counts for nothing.
      state: what the modules keep for a sequence.
      transfer: see `Box`.
    """
    weights = [nnx.state(module, nnx.Param) for module in modules if module is not None]
    return Box(name, None, count(weights), size(state), "next token", "", transfer)


def merged(boxes: Iterable[Box]) -> list[Box]:
    """Boxes of one name as one, and none that is empty."""
    found: dict[str, Box] = {}
    for box in boxes:
        other = found.get(box.name)
        if other is None:
            found[box.name] = box
        else:
            found[box.name] = dataclasses.replace(
                other,
                parameters=other.parameters + box.parameters,
                state_bytes=other.state_bytes + box.state_bytes,
            )
    return [box for box in found.values() if box.parameters or box.state_bytes]
