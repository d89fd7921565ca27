"""Small pieces that several optimizers are chained from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nestedjax.optim.matrices import (
    Axes,
    Layout,
    fold,
    labels,
    on_leaves,
    rms,
    unfold,
    widened,
)
from pallas_kernels import stacked
from pallas_kernels.newton_schulz import COEFFICIENTS, newton_schulz

PyTree = Any
Rate = float | jax.Array | Callable[[Any], Any]
Orthogonalize = str | Callable[[jax.Array], jax.Array]

_EPS = 1e-8


def matrix_function(name: Orthogonalize, *, steps: Any, eps: Any) -> Callable | None:
    """The map of matrices [..., m, n] that a name stands for; None for "none", which changes none.

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
    if not isinstance(steps, int):
        raise ValueError(
            f"steps={steps!r} must be an integer known when compiling; with"
            " optax.inject_hyperparams name it in static_args"
        )
    return lambda x: newton_schulz(x, variant=name, steps=steps, eps=eps)


def polar(x: jax.Array) -> jax.Array:
    """The exact orthogonal factor U V^T of x = U S V^T: what Newton-Schulz approximates."""
    u, _, vt = stacked(lambda one: tuple(jnp.linalg.svd(one, full_matrices=False)), x)
    return u @ vt


def number(name: str, value: Any, low: float = 0.0, high: float = 1.0) -> Any:
    """Refuse a hyper-parameter outside [low, high]; one that is traced passes.

    Raises:
      ValueError: it is outside.
    """
    if isinstance(value, int | float) and not low <= value <= high:
        raise ValueError(f"{name}={value} must be between {low} and {high}")
    return value


def choice(name: str, value: Any, known: tuple[str, ...]) -> Any:
    """Refuse a word that is not known.

    Raises:
      ValueError: it is not.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    return value


def scale_by_shape(rule: str | None, axes: Axes) -> optax.GradientTransformation:
    """The scale of an orthogonalised update of a matrix [outputs, inputs].

    "rms": `0.2 sqrt(max(outputs, inputs))`, about AdamW's root mean square; "jordan":
    `sqrt(max(1, outputs / inputs))`; None: 1. Other leaves stay as they are.
    """
    if rule is not None:
        choice("scale", rule, ("rms", "jordan"))

    def factor(layout: Any) -> float:
        if layout is None or rule is None:
            return 1.0
        rows, columns = layout.matrix[-2:]
        return 0.2 * max(rows, columns) ** 0.5 if rule == "rms" else max(1, rows / columns) ** 0.5

    def scale(updates: PyTree, params: PyTree = None) -> PyTree:
        return on_leaves(lambda layout, u: (u * factor(layout),), axes, updates)[0]

    return optax.stateless(scale)


def rescaled(updates: PyTree, target: Any, axes: Axes) -> PyTree:
    """Updates with the root mean square `target`, matrix by matrix; zero stays zero."""

    def one(layout: Layout | None, u: jax.Array) -> tuple[jax.Array]:
        size = rms(u, layout)
        return (u * (target / jnp.where(size > 0, size, jnp.ones_like(size))),)

    return on_leaves(one, axes, updates)[0]


def orthogonal(tree: PyTree, function: Callable | None, axes: Axes) -> PyTree:
    """`function` of the matrices that each leaf holds; `x / (rms(x) + 1e-8)` where it holds none.

    Args:
      tree: arrays in the parameters' shapes.
      function: of matrices [..., m, n]; None leaves every leaf as it is.
      axes: see `nestedjax.optim.matrices`.
    """
    if function is None:
        return tree

    def one(layout: Layout | None, x: jax.Array) -> tuple[jax.Array]:
        if layout is None:
            return (x / (rms(x, layout) + _EPS),)
        return (unfold(function(fold(x, layout)), layout),)

    return on_leaves(one, axes, tree)[0]


def with_adamw(
    rule: optax.GradientTransformation,
    learning_rate: Rate,
    *,
    axes: Axes,
    weight_decay: Any,
    rest: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """`rule` for the matrices, with decoupled decay; AdamW for everything else.

    Args:
      rule: a `scale_by_...`.
      learning_rate: of the rule, and of AdamW where `rest` is None.
      axes: which parameters are matrices; see `nestedjax.optim.matrices`.
      weight_decay: of the matrices, times the learning rate.
      rest: what steps the others; None: `optax.adamw(learning_rate, 0.9, 0.95, weight_decay=0)`.
    """
    matrix = optax.chain(
        rule,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(learning_rate, 0.9, 0.95, weight_decay=0.0) if rest is None else rest
    return widened(optax.partition({"matrix": matrix, "rest": lenient(others)}, labels(axes)))


def lenient(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` under standard type promotion: optax's Adam raises a float to an integer power."""
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def add_decay(
    learning_rate: Rate, weight_decay: Any, *, mask: Any = None
) -> optax.GradientTransformation:
    """Adds `-learning_rate weight_decay W` to updates that hold their rate already.

    Args:
      learning_rate: a rate or schedule.
      weight_decay: 0 adds nothing.
      mask: which parameters decay, as in `optax.add_decayed_weights`; None: all.
    """
    if callable(learning_rate):
        return optax.add_decayed_weights(lambda count: -weight_decay * learning_rate(count), mask)
    return optax.add_decayed_weights(-weight_decay * learning_rate, mask)
