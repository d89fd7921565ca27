"""SOAP: Adam in the slowly moving eigenbasis of Shampoo's factors."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, unfold, widened
from nestedjax.optim.memories import Memory, Part, every, first_moment, periodic, second_moment
from nestedjax.optim.parts import number, with_adamw
from nestedjax.optim.shampoo import factors, period, sandwich, side, summed
from nestedjax.optim.types import (
    Counter,
    Leaf,
    LearningRate,
    Leaves,
    Matrices,
    Number,
    PyTree,
)
from pallas_kernels import eigh, stacked


class BasisState(NamedTuple):
    """Eigenvectors, as columns, of the two factors L and R of each matrix: a pair (Q_L, Q_R)."""

    basis: PyTree[Float[Array, "*stack n n"]]

    def memories(self) -> tuple[Memory, ...]:
        """Its box."""
        about = "eigenvectors of the factors", "orthogonal iteration"
        return (Memory("eigenbasis", self.basis, *about),)


class SoapState(NamedTuple):
    """The state of `scale_by_soap`.

    Attributes:
      position: updates done.
      mu: first moment M, in the parameters' own basis.
      nu: second moment V, in the eigenbasis; of what is no matrix, in its own shape.
      left: moving average L of g g^T; nothing for a side longer than `max_side`.
      right: moving average R of g^T g; nothing for a side longer than `max_side`.
      bases: "every_<refresh>" -> the eigenvectors, moved once in so many updates.
    """

    position: Counter
    mu: Leaves
    nu: PyTree[Matrices]
    left: PyTree[Float[Array, "*stack outputs outputs"]]
    right: PyTree[Float[Array, "*stack inputs inputs"]]
    bases: dict[str, BasisState]

    def memories(self) -> Iterator[Memory | Part]:
        """Its boxes: two moments, the factors, and their eigenbasis at a period of its own."""
        yield first_moment(self.mu)
        yield second_moment(self.nu)
        yield from factors(self.left, self.right)
        yield from periodic(self.bases)


def soap(
    learning_rate: LearningRate,
    *,
    b1: Number = 0.95,
    b2: Number = 0.95,
    factor_decay: Number = 0.95,
    refresh: int = 10,
    max_side: int = 8192,
    eps: Number = 1e-8,
    weight_decay: Number = 0.01,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP for matrices, AdamW for everything else.

        L <- c L + (1 - c) g g^T,  R <- c R + (1 - c) g^T g,  Q_L, Q_R their eigenvectors
        M <- b1 M + (1 - b1) g,    V <- b2 V + (1 - b2) (Q_L^T g Q_R)^2
        W <- W - lr (Q_L ((Q_L^T M^ Q_R) / (sqrt(V^) + eps)) Q_R^T + weight_decay W)

    with c = factor_decay and bias-corrected M^ and V^. This is Adam in the eigenbasis of Shampoo's
    factors. The first step only finds the bases, by an eigendecomposition, and its direction is
    zero. Once in `refresh` steps each basis then makes one step of orthogonal iteration,
    `Q <- qr(L Q)`. A gradient is rotated by bases that were computed before it: a basis computed
    from the current gradient has null directions that hold only rounding error, which Adam would
    normalise to magnitude 1.

    Args:
      learning_rate: a number or a schedule; one that suits AdamW.
      b1: decay of the first moment, in one step.
      b2: decay of the second moment, in one step.
      factor_decay: decay of the factors L and R, in one step.
      refresh: steps between two updates of the bases.
      max_side: longest side of a matrix, in entries, that is rotated.
      eps: added to the denominator sqrt(V^).
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      axes: which parameters are matrices, and how; see `m3`.
      rest: the optimizer of the parameters that are no matrices; see `m3`.

    Returns:
      A transformation. With `optax.inject_hyperparams` name `refresh` and `max_side` in
      `static_args`.

    Raises:
      ValueError: an argument out of range, or axes that do not fit a parameter, by its name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.soap(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Vyas et al., SOAP (arXiv 2409.11321); spec B11.

    Departure from the paper: the eigenvectors are not sorted by their eigenvalues before an
    iteration.
    """
    rule = scale_by_soap(
        b1=b1,
        b2=b2,
        factor_decay=factor_decay,
        refresh=refresh,
        max_side=max_side,
        eps=eps,
        axes=axes,
    )
    return with_adamw(rule, learning_rate, axes=axes, weight_decay=weight_decay, rest=rest)


def scale_by_soap(
    *,
    b1: Number = 0.95,
    b2: Number = 0.95,
    factor_decay: Number = 0.95,
    refresh: int = 10,
    max_side: int = 8192,
    eps: Number = 1e-8,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `soap`, whose arguments these are; Adam for what is no matrix."""
    for name, value in (("b1", b1), ("b2", b2), ("factor_decay", factor_decay)):
        number(name, value)
    period(refresh)
    key = every(refresh)

    zeros = partial(_zeros, max_side=max_side)
    gather = partial(_gather, decay=factor_decay)

    def init(params: Leaves) -> SoapState:
        nu, left, right, basis = on_leaves(zeros, axes, params, outputs=4)
        mu = jax.tree.map(jnp.zeros_like, params)
        return SoapState(jnp.zeros((), jnp.int32), mu, nu, left, right, {key: BasisState(basis)})

    def update(updates, state, params=None, **extra):
        left, right = on_leaves(gather, axes, updates, state.left, state.right, outputs=2)
        adam = partial(_adam, t=state.position, b1=b1, b2=b2, eps=eps)
        moments = state.mu, state.nu, state.bases[key].basis
        direction, mu, nu = on_leaves(adam, axes, updates, *moments, outputs=3)
        basis = _refreshed(state, (left, right), updates, refresh, axes)
        bases = {key: BasisState(basis)}
        return direction, SoapState(state.position + 1, mu, nu, left, right, bases)

    return widened(optax.GradientTransformationExtraArgs(init, update))


def _zeros(layout: Layout | None, p: Leaf, *, max_side: int) -> tuple[Leaf, Any, Any, Any]:
    """Second moment, factors and bases of a leaf before its first gradient."""
    if layout is None:
        return (jnp.zeros_like(p), *[optax.MaskedNode()] * 3)
    left, right = (side(layout, axis, max_side, p.dtype) for axis in (-2, -1))
    return jnp.zeros(layout.matrix, p.dtype), left, right, (left, right)


def _gather(
    layout: Layout | None, g: Leaf, left: Any, right: Any, *, decay: Number
) -> tuple[Any, Any]:
    """The factors with a gradient averaged in."""
    if layout is None:
        return left, right
    g = fold(g, layout)
    return summed(left, g @ g.mT, decay), summed(right, g.mT @ g, decay)


def _adam(
    layout: Layout | None,
    g: Leaf,
    m: Leaf,
    nu: Leaf,
    basis: Any,
    *,
    t: Counter,
    b1: Number,
    b2: Number,
    eps: Number,
) -> tuple[Leaf, Leaf, Leaf]:
    """The direction of a leaf after t updates, and its two moments."""
    steps = t.astype(g.dtype)
    if layout is None:
        m = b1 * m + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * g * g
        return _ratio(m, nu, b1, b2, steps + 1, eps), m, nu
    back = [q if isinstance(q, optax.MaskedNode) else q.mT for q in basis]
    # The moments begin with the second gradient, the first that there are bases for, so that their
    # bias correction counts one step less than that of what is no matrix.
    first = t == 0
    m = jnp.where(first, m, b1 * m + (1 - b1) * g)
    square = sandwich(fold(g, layout), back[0], basis[1]) ** 2
    nu = jnp.where(first, nu, b2 * nu + (1 - b2) * square)
    # M is kept in the parameters' own basis and rotated here, so that nothing has to be done to it
    # when the bases move. V cannot be rotated, and stays as it is, as in the paper.
    u = _ratio(sandwich(fold(m, layout), back[0], basis[1]), nu, b1, b2, steps, eps)
    u = jnp.where(first, jnp.zeros_like(u), sandwich(u, basis[0], back[1]))
    return unfold(u, layout), m, nu


def _ratio(m: Leaf, nu: Leaf, b1: Number, b2: Number, t: Float[Array, ""], eps: Number) -> Leaf:
    """Adam's quotient after t updates of the moments."""
    return m / (1 - b1**t) / (jnp.sqrt(nu / (1 - b2**t)) + eps)


def _refreshed(
    state: SoapState, factors: tuple[PyTree, PyTree], like: Leaves, refresh: int, axes: Axes
) -> PyTree:
    """The bases for the next step.

    After the first step they are the eigenvectors of the factors, which hold one gradient then.
    One step of orthogonal iteration later moves them towards the eigenvectors of the new factors,
    at the price of a product and a QR decomposition in place of an eigendecomposition.
    """

    position, held = state.position, state.bases[every(refresh)].basis

    def each(function: Any) -> PyTree:
        def one(layout: Layout | None, _: Any, left: Any, right: Any, basis: Any) -> tuple[Any]:
            if layout is None:
                return (basis,)
            pairs = zip((left, right), basis, strict=True)
            return (
                tuple(f if isinstance(f, optax.MaskedNode) else function(f, q) for f, q in pairs),
            )

        return on_leaves(one, axes, like, *factors, held)[0]

    due_now = (position > 0) & (position % refresh == 0)
    which = jnp.where(position == 0, 0, jnp.where(due_now, 1, 2))
    return jax.lax.switch(
        which,
        [
            lambda: each(lambda factor, q: eigh(factor)[1]),
            lambda: each(lambda factor, q: stacked(_orthogonal, factor @ q)),
            lambda: held,
        ],
    )


def _orthogonal(matrix: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    return jnp.linalg.qr(matrix)[0]
