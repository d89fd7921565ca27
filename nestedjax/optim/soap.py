"""SOAP: Adam in the slowly moving eigenbasis of Shampoo's factors."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, unfold, widened
from nestedjax.optim.memories import Memory, Part, every, first_moment, periodic, second_moment
from nestedjax.optim.parts import with_adamw
from nestedjax.optim.ranges import checked
from nestedjax.optim.shampoo import factors, sandwich, side, summed
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
      count: updates done.
      mu: first moment M, in the parameters' own basis.
      nu: second moment V, in the eigenbasis; of what is no matrix, in its own shape.
      left: moving average L of g g^T; nothing for a side longer than `max_side`.
      right: moving average R of g^T g; nothing for a side longer than `max_side`.
      bases: "every_<refresh>" -> the eigenvectors, moved once in so many updates.
    """

    count: Counter  # type: ignore[assignment]  # hides tuple.count, as in optax
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


@checked
def soap(
    learning_rate: LearningRate,
    *,
    b1: Decay = 0.95,
    b2: Decay = 0.95,
    factor_decay: Decay = 0.95,
    refresh: Count = 10,
    max_side: Count = 8192,
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.1,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP for matrices, AdamW for everything else.

        L <- c L + (1 - c) g g^T,  R <- c R + (1 - c) g^T g,  Q_L, Q_R their eigenvectors
        M <- b1 M + (1 - b1) g,    V <- b2 V + (1 - b2) (Q_L^T g Q_R)^2
        W <- W - lr (Q_L ((Q_L^T M^ Q_R) / (sqrt(V) + eps)) Q_R^T + weight_decay W)

    with c = factor_decay and M^ = M sqrt(1 - b2^t) / (1 - b1^t), Adam's bias correction. This is
    Adam in the eigenbasis of Shampoo's factors. The first step only finds the bases, by an
    eigendecomposition, and moves nothing. Once in `refresh` steps each basis then makes one step of
    orthogonal iteration, `Q <- qr(L Q)` with the columns of Q, and V with them, in descending order
    of their eigenvalues. A gradient is rotated by bases that were computed before it: a basis
    computed from the current gradient has null directions that hold only rounding error, which Adam
    would normalise to magnitude 1.

    Args:
      learning_rate: a number or a schedule; one that suits AdamW.
      b1: decay of the first moment, in one step.
      b2: decay of the second moment, in one step.
      factor_decay: decay of the factors L and R, in one step.
      refresh: steps between two updates of the bases.
      max_side: longest side of a matrix, in entries, that is rotated.
      eps: added to the denominator sqrt(V).
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
      >>> tx = optim.soap(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Vyas et al., SOAP (arXiv 2409.11321), and the authors' code, github.com/nikhilvyas/SOAP;
      spec B11.

    Departures from the authors' code, with which the matrices agree otherwise:
      1. Weight decay acts on the weights before a step, as in AdamW, not on those after it. In a
         run, which decays weights itself, it acts in the first step as well.
      2. The first step skips matrices only.
      3. A side longer than 8,192 is not rotated; there it is 10,000 (`max_side`).
      4. `weight_decay` is 0.1 as everywhere in this library; there it is 0.01.
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

    def decay(count: Counter) -> Number:
        return jnp.where(count > 0, weight_decay, 0.0)

    never = isinstance(weight_decay, int | float) and weight_decay == 0
    shrink = weight_decay if never else decay
    return with_adamw(rule, learning_rate, axes=axes, weight_decay=shrink, rest=rest)


@checked
def scale_by_soap(
    *,
    b1: Decay = 0.95,
    b2: Decay = 0.95,
    factor_decay: Decay = 0.95,
    refresh: Count = 10,
    max_side: Count = 8192,
    eps: NonNegative = 1e-8,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `soap`, whose arguments these are; Adam for what is no matrix."""
    key = every(refresh)

    zeros = partial(_zeros, max_side=max_side)
    gather = partial(_gather, decay=factor_decay)

    def init(params: Leaves) -> SoapState:
        nu, left, right, basis = on_leaves(zeros, axes, params, outputs=4)
        mu = jax.tree.map(jnp.zeros_like, params)
        return SoapState(jnp.zeros((), jnp.int32), mu, nu, left, right, {key: BasisState(basis)})

    def update(updates, state, params=None, **extra):
        left, right = on_leaves(gather, axes, updates, state.left, state.right, outputs=2)
        adam = partial(_adam, t=state.count, b1=b1, b2=b2, eps=eps)
        moments = state.mu, state.nu, state.bases[key].basis
        direction, mu, nu = on_leaves(adam, axes, updates, *moments, outputs=3)
        nu, basis = _refreshed(state, nu, (left, right), updates, refresh, axes)
        bases = {key: BasisState(basis)}
        return direction, SoapState(state.count + 1, mu, nu, left, right, bases)

    return widened(optax.GradientTransformationExtraArgs(init, update))


def _zeros(layout: Layout | None, p: Leaf, *, max_side: int) -> tuple[Leaf, Any, Any, Any]:
    """Second moment, factors and bases of a leaf before its first gradient."""
    if layout is None:
        return (jnp.zeros_like(p), *[optax.MaskedNode()] * 3)
    left, right = (side(layout, axis, max_side, p.dtype) for axis in (-2, -1))
    # Arrays of their own: a buffer that is in a state twice cannot be donated.
    basis = jax.tree.map(jnp.zeros_like, (left, right))
    return jnp.zeros(layout.matrix, p.dtype), left, right, basis


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
    """Adam's quotient after t updates of the moments, with eps where SOAP's authors have it."""
    return m * (jnp.sqrt(1 - b2**t) / (1 - b1**t)) / (jnp.sqrt(nu) + eps)


def _refreshed(
    state: SoapState,
    nu: PyTree,
    factors: tuple[PyTree, PyTree],
    like: Leaves,
    refresh: int,
    axes: Axes,
) -> tuple[PyTree, PyTree]:
    """The second moment and the bases for the next step.

    After the first step the bases are the eigenvectors of the factors, which hold one gradient
    then. One step of orthogonal iteration later moves them towards the eigenvectors of the new
    factors, at the price of a product and a QR decomposition in place of an eigendecomposition.
    """
    count, held = state.count, state.bases[every(refresh)].basis

    def each(function: Callable[..., tuple[Any, Any]]) -> tuple[PyTree, ...]:
        return on_leaves(function, axes, like, nu, *factors, held, outputs=2)

    due_now = (count > 0) & (count % refresh == 0)
    which = jnp.where(count == 0, 0, jnp.where(due_now, 1, 2))
    return jax.lax.switch(which, [lambda: each(_first), lambda: each(_turned), lambda: (nu, held)])


def _first(
    layout: Layout | None, _: Leaf, nu: Leaf, left: Any, right: Any, basis: Any
) -> tuple[Leaf, Any]:
    """The second moment of a leaf, and the eigenvectors of its factors in descending order."""
    if layout is None:
        return nu, basis
    new = (f if isinstance(f, optax.MaskedNode) else eigh(f)[1] for f in (left, right))
    return nu, tuple(q if isinstance(q, optax.MaskedNode) else q[..., ::-1] for q in new)


def _turned(
    layout: Layout | None, _: Leaf, nu: Leaf, left: Any, right: Any, basis: Any
) -> tuple[Leaf, Any]:
    """The second moment of a leaf in the new order of its bases, and the bases.

    QR makes a column orthogonal to those before it, so that the first one converges to the
    eigenvector with the largest eigenvalue, and the order has to be that of the eigenvalues: in
    ascending order the small ones would have their directions taken from the large ones.
    """
    if layout is None:
        return nu, basis
    new = []
    for axis, factor, q in ((-2, left, basis[0]), (-1, right, basis[1])):
        if isinstance(factor, optax.MaskedNode):
            new.append(q)
            continue
        product = factor @ q
        order = jnp.argsort(jnp.sum(q * product, axis=-2), axis=-1, descending=True)
        nu = jnp.take_along_axis(nu, jnp.expand_dims(order, -3 - axis), axis=axis)
        product = jnp.take_along_axis(product, order[..., None, :], axis=-1)
        new.append(stacked(_orthogonal, product))
    return nu, tuple(new)


def _orthogonal(matrix: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    return jnp.linalg.qr(matrix)[0]
