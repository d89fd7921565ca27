"""The types that the signatures of optimizers share."""

from collections.abc import Callable
from typing import TypeAlias

import optax
from jaxtyping import Array, Float, Int32, PyTree, Real

# A hyper-parameter: a plain number, or an array under `optax.inject_hyperparams`.
Number: TypeAlias = float | int | Real[Array, ""]
LearningRate: TypeAlias = Number | optax.Schedule

Counter: TypeAlias = Int32[Array, ""]
Leaf: TypeAlias = Float[Array, "..."]  # in the shape of one parameter
Leaves: TypeAlias = PyTree[Float[Array, "..."]]  # shaped like the parameters
Matrices: TypeAlias = Float[Array, "*stack outputs inputs"]  # y = matrix @ x
MatrixFunction: TypeAlias = Callable[[Matrices], Matrices]

__all__ = [
    "Counter",
    "Leaf",
    "Leaves",
    "LearningRate",
    "Matrices",
    "MatrixFunction",
    "Number",
    "PyTree",
]
