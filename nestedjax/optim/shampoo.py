"""Shampoo: gradients whitened on both sides by roots of their summed outer products."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestedjax.levels import due
from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, unfold, widened
from nestedjax.optim.memories import Memory, momentum
from nestedjax.optim.parts import PyTree, Rate, choice, number, rescaled, with_adamw
from pallas_kernels import eigh


class ShampooState(NamedTuple):
    """The state of `scale_by_shampoo`.

    Attributes:
      position: updates done.
      trace: momentum; () without.
      left: sums of g g^T [..., outputs, outputs]; of g^2 for what is no matrix.
      right: sums of g^T g [..., inputs, inputs].
      held: inverse roots of the two, computed once in `refresh` updates; () where it is 1.
    """

    position: jax.Array  # shape=(), dtype=int32
    trace: PyTree
    left: PyTree
    right: PyTree
    held: PyTree

    def memories(self) -> tuple[Memory, ...]:
        """Its boxes."""
        return momentum(self.trace), *factors(self.left, self.right, cache=self.held)


def shampoo(
    learning_rate: Rate,
    *,
    b1: Any = 0.0,
    b2: Any = None,
    sides: str = "both",
    refresh: int = 1,
    max_side: int = 8192,
    rms_rescale: Any = None,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo for matrices, AdamW for everything else.

        L <- L + g g^T,  R <- R + g^T g,   W <- W - lr ((L + eps)^-1/4 m (R + eps)^-1/4 + ...)

    Args:
      learning_rate: a rate or schedule.
      b1: decay of a momentum m; 0: m = g.
      b2: decay of L and R as moving averages; None sums.
      sides: "both", or "left": `(L + eps)^-1/2 m`, one-sided full-matrix AdaGrad (equation 106 with
        its shapes mended).
      refresh: updates between two computations of the roots. What a gradient holds that those
        before the last one did not is divided by eps^(1/2): with more than 1, give a larger eps.
      max_side: a longer side is not preconditioned.
      rms_rescale: root mean square of each matrix' update; None leaves it as it comes out.
      eps: added to the eigenvalues.
      weight_decay: decoupled, of the matrices.
      axes: which parameters are matrices, and how; see `m3`.
      rest: what steps the others; see `m3`.

    Raises:
      ValueError: an argument out of range, or axes that do not fit a parameter, by its name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.shampoo(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Gupta et al., Shampoo (arXiv 1802.09568); Nested Learning (arXiv 2512.24695), equations
      106-111.
    """
    rule = scale_by_shampoo(
        b1=b1,
        b2=b2,
        sides=sides,
        refresh=refresh,
        max_side=max_side,
        rms_rescale=rms_rescale,
        eps=eps,
        axes=axes,
    )
    return with_adamw(rule, learning_rate, axes=axes, weight_decay=weight_decay, rest=rest)


def scale_by_shampoo(
    *,
    b1: Any = 0.0,
    b2: Any = None,
    sides: str = "both",
    refresh: int = 1,
    max_side: int = 8192,
    rms_rescale: Any = None,
    eps: Any = 1e-6,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `shampoo`, whose arguments these are; AdaGrad for what is no matrix."""
    number("b1", b1)
    number("b2", 0.0 if b2 is None else b2)
    choice("sides", sides, ("both", "left"))
    period(refresh)
    momentum = not (isinstance(b1, int | float) and b1 == 0)
    power = -0.5 if sides == "left" else -0.25

    def zeros(layout: Layout | None, p: jax.Array) -> tuple[Any, Any]:
        if layout is None:
            return jnp.zeros_like(p), optax.MaskedNode()
        left, right = (side(layout, axis, max_side, p.dtype) for axis in (-2, -1))
        return left, optax.MaskedNode() if sides == "left" else right

    def roots(left: PyTree, right: PyTree, like: PyTree) -> PyTree:
        def one(layout: Layout | None, _: Any, left: Any, right: Any) -> tuple[Any]:
            if layout is None:
                return (optax.MaskedNode(),)
            return (tuple(_root(m, power, eps) for m in (left, right)),)

        return on_leaves(one, axes, like, left, right)[0]

    def init(params: PyTree) -> ShampooState:
        left, right = on_leaves(zeros, axes, params, outputs=2)
        trace = jax.tree.map(jnp.zeros_like, params) if momentum else ()
        held = () if refresh == 1 else roots(left, right, params)
        return ShampooState(jnp.zeros((), jnp.int32), trace, left, right, held)

    def gather(layout: Layout | None, g: jax.Array, left: Any, right: Any) -> tuple[Any, Any]:
        if layout is None:
            return summed(left, g * g, b2), right
        g = fold(g, layout)
        return summed(left, g @ g.mT, b2), summed(right, g.mT @ g, b2)

    def direct(layout: Layout | None, m: jax.Array, left: Any, held: Any) -> tuple[Any]:
        if layout is None:
            return (m / (jnp.sqrt(left) + eps),)
        for_left, for_right = held
        return (unfold(sandwich(fold(m, layout), for_left, for_right), layout),)

    def update(updates, state, params=None, **extra):
        left, right = on_leaves(gather, axes, updates, state.left, state.right, outputs=2)
        trace = jax.tree.map(lambda t, g: b1 * t + g, state.trace, updates) if momentum else ()

        def fresh() -> PyTree:
            return roots(left, right, updates)

        first = due(state.position + refresh - 1, refresh)  # begins a period
        held = fresh() if refresh == 1 else jax.lax.cond(first, fresh, lambda: state.held)
        (direction,) = on_leaves(direct, axes, trace if momentum else updates, left, held)
        if rms_rescale is not None:
            direction = rescaled(direction, rms_rescale, axes)
        held = () if refresh == 1 else held
        return direction, ShampooState(state.position + 1, trace, left, right, held)

    return widened(optax.GradientTransformationExtraArgs(init, update))


def factors(left: PyTree, right: PyTree, *, cache: PyTree = ()) -> tuple[Memory, Memory]:
    """The boxes of the two factors of each matrix."""
    rule = "sum or moving average"
    return (
        Memory("left factor", left, "l2 to g g^T", rule, cache=cache),
        Memory("right factor", right, "l2 to g^T g", rule),
    )


def period(refresh: Any) -> None:
    """Refuse a period that is no integer >= 1 known when compiling.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(refresh, int) or refresh < 1:
        raise ValueError(
            f"refresh={refresh!r} must be an integer >= 1, known when compiling; with"
            " optax.inject_hyperparams name it in static_args"
        )


def side(layout: Layout, axis: int, max_side: int, dtype: Any) -> Any:
    """A zero factor [..., n, n] for one side of a matrix; nothing for a side that is too long."""
    n = layout.matrix[axis]
    return jnp.zeros((*layout.matrix[:-2], n, n), dtype) if n <= max_side else optax.MaskedNode()


def summed(total: Any, new: jax.Array, decay: Any) -> Any:
    """A sum, or a moving average with a decay; nothing stays nothing."""
    if isinstance(total, optax.MaskedNode):
        return total
    return total + new if decay is None else decay * total + (1 - decay) * new


def sandwich(m: jax.Array, left: Any, right: Any) -> jax.Array:
    """`left m right`, without what is missing."""
    m = m if isinstance(left, optax.MaskedNode) else left @ m
    return m if isinstance(right, optax.MaskedNode) else m @ right


def _root(matrix: Any, power: float, eps: Any) -> Any:
    if isinstance(matrix, optax.MaskedNode):
        return matrix
    values, vectors = eigh(matrix)
    scale = (jnp.maximum(values, 0.0) + eps) ** power
    return (vectors * scale[..., None, :]) @ vectors.mT
