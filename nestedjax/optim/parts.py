"""Small pieces that several optimizers are chained from."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from nestedjax.optim.matrices import (
    Axes,
    Layout,
    fold,
    labels,
    normalized,
    on_leaves,
    unfold,
    widened,
)
from nestedjax.optim.types import (
    LearningRate,
    Leaves,
    Matrices,
    MatrixFunction,
    NonNegative,
    Number,
    PyTree,
)
from pallas_kernels import stacked
from pallas_kernels.newton_schulz import COEFFICIENTS, newton_schulz

Orthogonalize: TypeAlias = Literal["quintic", "cubic", "svd", "none"] | MatrixFunction
Shape: TypeAlias = Literal["rms", "jordan"]
Mask: TypeAlias = Callable[[PyTree], PyTree] | PyTree


def matrix_function(name: Orthogonalize, *, steps: int) -> MatrixFunction | None:
    """The map of matrices that a name stands for; None for "none", which leaves them as they are.

    Args:
      name: see `m3`.
      steps: Newton-Schulz iterations.

    Raises:
      ValueError: an unknown name.
    """
    if callable(name):
        return name
    if name == "none":
        return None
    if name == "svd":
        return polar
    if name not in COEFFICIENTS:
        known = ", ".join((*COEFFICIENTS, "svd", "none"))
        raise ValueError(f"orthogonalize={name!r} is not one of {known}, nor a function")
    return lambda x: newton_schulz(x, variant=name, steps=steps)


def polar(x: Matrices) -> Matrices:
    """The exact orthogonal factor U V^T of x = U S V^T: what Newton-Schulz approximates."""
    u, _, vt = stacked(lambda one: tuple(jnp.linalg.svd(one, full_matrices=False)), x)
    return u @ vt


def choice(name: str, value: Any, known: tuple[str, ...]) -> Any:
    """The word itself, if it is a known one.

    Raises:
      ValueError: it is not.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    return value


def scale_by_shape(rule: Shape | None, axes: Axes) -> optax.GradientTransformation:
    """Scale the orthogonalised update of each matrix [outputs, inputs] by its shape.

    An orthogonal m x n matrix has root mean square `1 / sqrt(max(m, n))`. "rms" multiplies by
    `0.2 sqrt(max(outputs, inputs))`, which makes it 0.2, about that of AdamW's updates; "jordan"
    by `sqrt(max(1, outputs / inputs))`; None by 1. Other leaves stay as they are.
    """
    if rule is not None:
        choice("scale", rule, ("rms", "jordan"))

    def factor(layout: Layout | None) -> float:
        if layout is None or rule is None:
            return 1.0
        rows, columns = layout.matrix[-2:]
        return 0.2 * max(rows, columns) ** 0.5 if rule == "rms" else max(1, rows / columns) ** 0.5

    def scale(updates: PyTree, params: PyTree = None) -> PyTree:
        return on_leaves(lambda layout, u: (u * factor(layout),), axes, updates)[0]

    return optax.stateless(scale)


def rescaled(updates: Leaves, target: Number, axes: Axes) -> Leaves:
    """Updates with the root mean square `target`, matrix by matrix; zero stays zero."""

    return on_leaves(lambda layout, u: (normalized(u, layout) * target,), axes, updates)[0]


def orthogonal(tree: Leaves, function: MatrixFunction | None, axes: Axes) -> Leaves:
    """`function` of the matrices that each leaf holds; `x / rms(x)` where it holds none.

    The second is what an orthogonal factor does to a matrix, for a leaf without a matrix: the scale
    of a momentum is lost.

    Args:
      tree: arrays in the parameters' shapes.
      function: of matrices [..., m, n]; None leaves every leaf as it is.
      axes: see `nestedjax.optim.matrices`.
    """
    if function is None:
        return tree

    def one(layout: Layout | None, x: jax.Array) -> tuple[jax.Array]:
        if layout is None:
            return (normalized(x, layout),)
        return (unfold(function(fold(x, layout)), layout),)

    return on_leaves(one, axes, tree)[0]


def with_adamw(
    rule: optax.GradientTransformation,
    learning_rate: LearningRate,
    *,
    axes: Axes,
    weight_decay: NonNegative | optax.Schedule,
    rest: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """`rule` for the matrices, with decoupled weight decay; AdamW for everything else.

    Args:
      rule: a `scale_by_...`.
      learning_rate: of the rule, and of AdamW where `rest` is None.
      axes: which parameters are matrices; see `nestedjax.optim.matrices`.
      weight_decay: of the matrices, multiplied by the learning rate; a number or a schedule.
      rest: the optimizer of the other parameters; None:
        `optax.adamw(learning_rate, 0.9, 0.95, weight_decay=0)`.
    """
    matrix = optax.chain(
        rule,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(learning_rate, 0.9, 0.95, weight_decay=0.0) if rest is None else rest
    return widened(optax.partition({"matrix": matrix, "rest": lenient(others)}, labels(axes)))


def lenient(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` under standard type promotion.

    Adam's bias correction in optax raises a float to an integer power, which strict promotion
    (`jax_numpy_dtype_promotion="strict"`) refuses.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def matrices_in(axes: Axes) -> Callable[[PyTree], PyTree]:
    """Which parameters are matrices, as the mask of `add_decay`: a tree of bool."""

    def mask(params: PyTree) -> PyTree:
        return jax.tree.map(lambda kind: kind == "matrix", labels(axes)(params))

    return mask


def add_decay(
    learning_rate: LearningRate, weight_decay: Number, *, mask: Mask | None = None
) -> optax.GradientTransformation:
    """Add `-learning_rate weight_decay W` to updates that contain their learning rate already.

    Args:
      learning_rate: a number or a schedule.
      weight_decay: decoupled; 0 adds nothing.
      mask: which parameters decay, as in `optax.add_decayed_weights`; None: all.
    """
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    if callable(learning_rate):
        return optax.add_decayed_weights(lambda count: -weight_decay * learning_rate(count), mask)
    return optax.add_decayed_weights(-weight_decay * learning_rate, mask)
