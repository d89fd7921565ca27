"""The types that the signatures of optimizers share, with the ranges of numbers."""

from collections.abc import Callable
from typing import Annotated, TypeAlias

import optax
from jaxtyping import Array, Float, Int32, PyTree, Real

from nestedjax.optim.ranges import Range

# A hyper-parameter: a plain number, or an array under `optax.inject_hyperparams`.
Number: TypeAlias = float | int | Real[Array, ""]
Finite: TypeAlias = Annotated[Number, Range()]
NonNegative: TypeAlias = Annotated[Number, Range(0)]
Positive: TypeAlias = Annotated[Number, Range(0, above=True)]
Fraction: TypeAlias = Annotated[Number, Range(0, 1)]
# Of a moving average: with 1 it would never take in a gradient, and its bias correction be 0 / 0.
Decay: TypeAlias = Annotated[Number, Range(0, 1, below=True)]
Count: TypeAlias = Annotated[int, Range(1, integer=True)]
LearningRate: TypeAlias = NonNegative | optax.Schedule

Counter: TypeAlias = Int32[Array, ""]
Leaf: TypeAlias = Float[Array, "..."]  # in the shape of one parameter
Leaves: TypeAlias = PyTree[Float[Array, "..."]]  # shaped like the parameters
Matrices: TypeAlias = Float[Array, "*stack outputs inputs"]  # y = matrix @ x
MatrixFunction: TypeAlias = Callable[[Matrices], Matrices]

__all__ = [
    "Count",
    "Counter",
    "Decay",
    "Finite",
    "Fraction",
    "Leaf",
    "Leaves",
    "LearningRate",
    "Matrices",
    "MatrixFunction",
    "NonNegative",
    "Number",
    "Positive",
    "PyTree",
]
