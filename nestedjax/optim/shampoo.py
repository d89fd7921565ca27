"""Shampoo: gradients whitened on both sides by roots of their summed outer products."""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float

from nestedjax.levels import due
from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, unfold, widened
from nestedjax.optim.memories import Memory, momentum
from nestedjax.optim.parts import choice, rescaled, with_adamw
from nestedjax.optim.ranges import checked
from nestedjax.optim.types import (
    Count,
    Counter,
    Decay,
    Leaf,
    LearningRate,
    Leaves,
    Matrices,
    NonNegative,
    Number,
    Positive,
    PyTree,
)
from pallas_kernels import eigh, norm

Sides = Literal["both", "left"]


class ShampooState(NamedTuple):
    """The state of `scale_by_shampoo`.

    Attributes:
      count: updates done.
      trace: momentum m; () without.
      left: sums L of g g^T; of g^2 for what is no matrix; nothing for a side longer than
        `max_side`.
      right: sums R of g^T g; nothing for a side longer than `max_side`.
      held: the inverse roots of the two, computed once in `refresh` updates; () where it is 1.
    """

    count: Counter  # type: ignore[assignment]  # hides tuple.count, as in optax
    trace: Leaves
    left: PyTree[Float[Array, "*stack outputs outputs"]]
    right: PyTree[Float[Array, "*stack inputs inputs"]]
    held: PyTree

    def memories(self) -> tuple[Memory, ...]:
        """Its boxes."""
        return momentum(self.trace), *factors(self.left, self.right, cache=self.held)


@checked
def shampoo(
    learning_rate: LearningRate,
    *,
    b1: Decay = 0.0,
    b2: Decay | None = None,
    sides: Sides = "both",
    refresh: Count = 1,
    max_side: Count = 8192,
    rms_rescale: Positive | None = None,
    eps: NonNegative = 1e-6,
    weight_decay: NonNegative = 0.1,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo for matrices, AdamW for everything else.

        L <- L + g g^T,  R <- R + g^T g,  m <- b1 m + g
        W <- W - lr ((L + eps I)^-1/4 m (R + eps I)^-1/4 + weight_decay W)

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the momentum m, in one step; 0 makes m the gradient.
      b2: decay of L and R as moving averages, in one step; None makes them sums.
      sides: what whitens m: "both" factors as above, or the "left" one alone,
        `(L + eps I)^-1/2 m`, which is one-sided full-matrix AdaGrad (equation 106).
      refresh: steps between two computations of the roots.
      max_side: longest side of a matrix, in entries, that is preconditioned.
      rms_rescale: root mean square that each matrix' update is rescaled to; None leaves it as it
        comes out.
      eps: added to the eigenvalues of L and R.
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      axes: which parameters are matrices, and how; see `m3`.
      rest: the optimizer of the parameters that are no matrices; see `m3`.

    Returns:
      A transformation. With `optax.inject_hyperparams` name `refresh`, `max_side` and functions in
      `static_args`.

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
      106-111; spec B8 and B11.

    Departures from the papers:
      1. The printed shapes of equations 106-111 do not match; "left" is the reading in which they
         do.
      2. With `refresh` above 1 an update is no longer than the longest that roots of this step
         could give. Roots that do not know a direction of the gradient multiply it by eps^(-1/2),
         and in `refresh` such steps training would diverge. With `refresh=1` nothing is cut.
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


@checked
def scale_by_shampoo(
    *,
    b1: Decay = 0.0,
    b2: Decay | None = None,
    sides: Sides = "both",
    refresh: Count = 1,
    max_side: Count = 8192,
    rms_rescale: Positive | None = None,
    eps: NonNegative = 1e-6,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `shampoo`, whose arguments these are; AdaGrad for what is no matrix."""
    choice("sides", sides, get_args(Sides))
    has_momentum = not (isinstance(b1, int | float) and b1 == 0)
    # For one gradient both powers give its orthogonal factor: L = g g^T has the eigenvalues s^2, so
    # that L^-1/2 alone, or L^-1/4 from the left and R^-1/4 from the right, divides s by s.
    power = -0.5 if sides == "left" else -0.25

    zeros = partial(_zeros, sides=sides, max_side=max_side)
    gather = partial(_gather, decay=b2)
    # L holds the gradient of its own step, times 1 - b2, so that L^-1/2 g has no singular value
    # above (1 - b2)^-1/2, and a momentum's are 1 / (1 - b1) times that.
    longest = None if refresh == 1 else (1 if b2 is None else (1 - b2) ** -0.5) / (1 - b1)
    direct = partial(_direct, eps=eps, power=power, longest=longest)
    roots = partial(_roots, power=power, eps=eps, axes=axes)

    def init(params: Leaves) -> ShampooState:
        left, right = on_leaves(zeros, axes, params, outputs=2)
        trace = jax.tree.map(jnp.zeros_like, params) if has_momentum else ()
        held = () if refresh == 1 else roots(left, right, params)
        return ShampooState(jnp.zeros((), jnp.int32), trace, left, right, held)

    def update(updates, state, params=None, **extra):
        left, right = on_leaves(gather, axes, updates, state.left, state.right, outputs=2)
        trace = jax.tree.map(lambda t, g: b1 * t + g, state.trace, updates) if has_momentum else ()

        def fresh() -> PyTree:
            return roots(left, right, updates)

        # Roots are computed in the first step of a period, from statistics that hold its gradient:
        # at the end of one, the first period would have none.
        first = due(state.count + refresh - 1, refresh)
        held = fresh() if refresh == 1 else jax.lax.cond(first, fresh, lambda: state.held)
        (direction,) = on_leaves(direct, axes, trace if has_momentum else updates, left, held)
        if rms_rescale is not None:
            direction = rescaled(direction, rms_rescale, axes)
        held = () if refresh == 1 else held
        return direction, ShampooState(state.count + 1, trace, left, right, held)

    return widened(optax.GradientTransformationExtraArgs(init, update))


def _zeros(
    layout: Layout | None, p: Leaf, *, sides: Sides, max_side: int
) -> tuple[Leaf | optax.MaskedNode, Leaf | optax.MaskedNode]:
    """The two factors of a leaf before its first gradient; one of its own shape for no matrix."""
    if layout is None:
        return jnp.zeros_like(p), optax.MaskedNode()
    left, right = (side(layout, axis, max_side, p.dtype) for axis in (-2, -1))
    return left, optax.MaskedNode() if sides == "left" else right


def _gather(
    layout: Layout | None,
    g: Leaf,
    left: Leaf | optax.MaskedNode,
    right: Leaf | optax.MaskedNode,
    *,
    decay: Number | None,
) -> tuple[Leaf | optax.MaskedNode, Leaf | optax.MaskedNode]:
    """The factors with a gradient added."""
    if layout is None:
        return summed(left, g * g, decay), right
    g = fold(g, layout)
    return summed(left, g @ g.mT, decay), summed(right, g.mT @ g, decay)


def _direct(
    layout: Layout | None,
    m: Leaf,
    left: Leaf | optax.MaskedNode,
    held: PyTree,
    *,
    eps: Number,
    power: float,
    longest: Number | None,
) -> tuple[Leaf]:
    """The momentum of a leaf between the roots of its factors, cut to what is the longest."""
    if layout is None:
        return (m / (jnp.sqrt(left) + eps),)
    m = fold(m, layout)
    u = sandwich(m, *held)
    if longest is not None:
        # Fresh roots leave a singular value s of m at most s^rest, with rest 0 unless a side is too
        # long; the sum of their squares is the largest where all are equal.
        rest = 1 + 2 * power * sum(not isinstance(root, optax.MaskedNode) for root in held)
        equal = min(layout.matrix[-2:]) ** 0.5
        limit = longest * equal * (norm(m, (-2, -1)) / equal) ** rest
        size = norm(u, (-2, -1))
        u = jnp.where(size > limit, u * (limit / size), u)
    return (unfold(u, layout),)


def _roots(
    left: PyTree, right: PyTree, like: Leaves, *, power: float, eps: Number, axes: Axes
) -> PyTree:
    """The pair of roots of each leaf's factors; nothing for what is no matrix."""

    def one(layout: Layout | None, _: Leaf, *pair: Leaf | optax.MaskedNode) -> tuple[PyTree]:
        if layout is None:
            return (optax.MaskedNode(),)
        return (tuple(_root(factor, power, eps) for factor in pair),)

    return on_leaves(one, axes, like, left, right)[0]


def factors(left: PyTree, right: PyTree, *, cache: PyTree = ()) -> tuple[Memory, Memory]:
    """The boxes of the two factors of each matrix."""
    rule = "sum or moving average"
    return (
        Memory("left factor", left, "l2 to g g^T", rule, cache=cache),
        Memory("right factor", right, "l2 to g^T g", rule),
    )


def side(
    layout: Layout, axis: int, max_side: int, dtype: DTypeLike
) -> Float[Array, "*stack n n"] | optax.MaskedNode:
    """A zero factor for one side of a matrix; nothing for a side that is too long."""
    n = layout.matrix[axis]
    return jnp.zeros((*layout.matrix[:-2], n, n), dtype) if n <= max_side else optax.MaskedNode()


def summed(
    total: Leaf | optax.MaskedNode, new: Leaf, decay: Number | None
) -> Leaf | optax.MaskedNode:
    """A sum, or a moving average where there is a decay; nothing stays nothing."""
    if isinstance(total, optax.MaskedNode):
        return total
    return total + new if decay is None else decay * total + (1 - decay) * new


def sandwich(
    m: Matrices,
    left: Float[Array, "*stack outputs outputs"] | optax.MaskedNode,
    right: Float[Array, "*stack inputs inputs"] | optax.MaskedNode,
) -> Matrices:
    """`left m right`, without the factors that are nothing."""
    m = m if isinstance(left, optax.MaskedNode) else left @ m
    return m if isinstance(right, optax.MaskedNode) else m @ right


def _root(
    matrix: Float[Array, "*stack n n"] | optax.MaskedNode, power: float, eps: Number
) -> Float[Array, "*stack n n"] | optax.MaskedNode:
    """`(matrix + eps I)^power`; nothing stays nothing."""
    if isinstance(matrix, optax.MaskedNode):
        return matrix
    values, vectors = eigh(matrix)
    # Rounding makes eigenvalues of a semidefinite matrix slightly negative: no root is taken of
    # those. What has never been in a gradient is amplified by eps^power per side.
    scale = (jnp.maximum(values, 0.0) + eps) ** power
    return (vectors * scale[..., None, :]) @ vectors.mT
