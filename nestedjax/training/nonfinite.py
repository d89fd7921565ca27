"""Finding the first value of a computation that is not finite."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestedjax.training.state import PyTree
from pallas_kernels import accumulation_dtype


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says where it broke and what to do."""


class Nonfinite(NamedTuple):
    """The first value found that is not finite.

    Attributes:
      name: which of the trees.
      leaf: path inside the tree, empty for a single array.
      value: the value, nan or +-inf.
      place: its index in the leaf.
    """

    name: str
    leaf: str
    value: float
    place: tuple[int, ...]

    def __str__(self) -> str:
        leaf = f" at {self.leaf}" if self.leaf else ""
        place = f"[{', '.join(map(str, self.place))}]" if self.place else ""
        return f"{self.name}{leaf}{place} is {self.value}"


def advice(found: Nonfinite | None, *, step: int, first: str | None = None) -> str:
    """What to do about a value that is not finite, as far as what is known tells.

    Args:
      found: the first such value in the order of cause and effect; None if parameters, loss and
        gradient are all finite.
      step: updates that were applied before.
      first: the name of the level that reads the batch itself, where levels are known.

    Example:
      >>> advice(None, step=0)
      "the gradient is finite: look at the optimizer's arguments and at weight_decay"
    """
    if found is None:
        return "the gradient is finite: look at the optimizer's arguments and at weight_decay"
    if found.name == first:
        return "the parameters are finite: look at this batch, such as tokens beyond the vocabulary"
    if step == 0:
        return (
            "no update was made yet, so it is not the learning rate: look at the data, and at the"
            " settings of what is named"
        )
    return "lower learning_rate, or clip harder"


def locate_nonfinite(named_trees: Iterable[tuple[str, PyTree]]) -> Nonfinite | None:
    """Look through trees in order for the first leaf with a value that is not finite.

    Args:
      named_trees: pairs of a name and a tree of arrays, in the order of cause and effect; an
        iterator is only read as far as needed.

    Returns:
      The first such value, or None if all are finite.

    Example:
      >>> import jax.numpy as jnp
      >>> levels = [("fast", jnp.ones(2)), ("slow", {"w": jnp.array([1.0, jnp.inf])})]
      >>> print(locate_nonfinite(levels))
      slow at w[1] is inf
    """
    for name, tree in named_trees:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact) or bool(jnp.isfinite(leaf).all()):
                continue
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            if not leaf.is_fully_addressable:  # no process sees the whole of it
                return Nonfinite(name, where, float("nan"), ())
            values = np.asarray(leaf.astype(accumulation_dtype(leaf)))
            place = tuple(map(int, np.argwhere(~np.isfinite(values))[0]))
            return Nonfinite(name, where, float(values[place].real), place)
    return None
