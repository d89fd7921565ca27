"""SOAP: Adam in the slowly moving eigenbasis of Shampoo's factors."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, unfold, widened
from nestedjax.optim.memories import Memory, Part, every, first_moment, periodic, second_moment
from nestedjax.optim.parts import PyTree, Rate, number, with_adamw
from nestedjax.optim.shampoo import factors, period, sandwich, side, summed
from pallas_kernels import eigh, stacked


class BasisState(NamedTuple):
    """Eigenvectors of the two factors, one pair a matrix."""

    basis: PyTree

    def memories(self) -> tuple[Memory, ...]:
        """Its box."""
        about = "eigenvectors of the factors", "orthogonal iteration"
        return (Memory("eigenbasis", self.basis, *about),)


class SoapState(NamedTuple):
    """The state of `scale_by_soap`.

    Attributes:
      position: updates done.
      mu: first moment, in the parameters' own basis.
      nu: second moment, in the eigenbasis, [..., outputs, inputs].
      left: moving average of g g^T.
      right: moving average of g^T g.
      bases: "every_<refresh>" -> their eigenvectors, moved once in so many updates.
    """

    position: jax.Array  # shape=(), dtype=int32
    mu: PyTree
    nu: PyTree
    left: PyTree
    right: PyTree
    bases: dict[str, BasisState]

    def memories(self) -> Iterator[Memory | Part]:
        """Its boxes: two moments, the factors, and their eigenbasis at a period of its own."""
        yield first_moment(self.mu)
        yield second_moment(self.nu)
        yield from factors(self.left, self.right)
        yield from periodic(self.bases)


def soap(
    learning_rate: Rate,
    *,
    b1: Any = 0.95,
    b2: Any = 0.95,
    factor_decay: Any = 0.95,
    refresh: int = 10,
    max_side: int = 8192,
    eps: Any = 1e-8,
    weight_decay: Any = 0.01,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP for matrices, AdamW for everything else.

        L <- c L + (1 - c) g g^T,  R <- c R + (1 - c) g^T g,  Q_L, Q_R their eigenvectors
        M <- b1 M + (1 - b1) g,    V <- b2 V + (1 - b2) (Q_L^T g Q_R)^2
        W <- W - lr (Q_L ((Q_L^T M^ Q_R) / (sqrt(V^) + eps)) Q_R^T + weight_decay W)

    with bias-corrected M^ and V^. The first step moves no weight: it finds the bases, by an
    eigendecomposition. Once in `refresh` steps they make one step of orthogonal iteration,
    `Q <- qr(L Q)`. A gradient is rotated by bases that have not seen it; in bases of its own, the
    directions it does not have would hold rounding errors alone, which Adam scales up to 1.

    Args:
      learning_rate: a rate or schedule that suits AdamW.
      b1: decay of the first moment.
      b2: decay of the second moment.
      factor_decay: c, of L and R.
      refresh: updates between two steps of the bases.
      max_side: a longer side is not rotated.
      eps: in the denominator.
      weight_decay: decoupled, of the matrices.
      axes: which parameters are matrices, and how; see `m3`.
      rest: what steps the others; see `m3`.

    Raises:
      ValueError: an argument out of range, or axes that do not fit a parameter, by its name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.soap(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Vyas et al., SOAP (arXiv 2409.11321).

    Departure: eigenvectors are not sorted again after an iteration.
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
    b1: Any = 0.95,
    b2: Any = 0.95,
    factor_decay: Any = 0.95,
    refresh: int = 10,
    max_side: int = 8192,
    eps: Any = 1e-8,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `soap`, whose arguments these are; Adam for what is no matrix."""
    for name, value in (("b1", b1), ("b2", b2), ("factor_decay", factor_decay)):
        number(name, value)
    period(refresh)
    key = every(refresh)

    def zeros(layout: Layout | None, p: jax.Array) -> tuple[Any, Any, Any, Any]:
        if layout is None:
            return (jnp.zeros_like(p), *[optax.MaskedNode()] * 3)
        left, right = (side(layout, axis, max_side, p.dtype) for axis in (-2, -1))
        return jnp.zeros(layout.matrix, p.dtype), left, right, (left, right)

    def init(params: PyTree) -> SoapState:
        nu, left, right, basis = on_leaves(zeros, axes, params, outputs=4)
        mu = jax.tree.map(jnp.zeros_like, params)
        return SoapState(jnp.zeros((), jnp.int32), mu, nu, left, right, {key: BasisState(basis)})

    def gather(layout: Layout | None, g: jax.Array, left: Any, right: Any) -> tuple[Any, Any]:
        if layout is None:
            return left, right
        g = fold(g, layout)
        return summed(left, g @ g.mT, factor_decay), summed(right, g.mT @ g, factor_decay)

    def adam(t: Any, layout: Layout | None, g: Any, m: Any, nu: Any, basis: Any):
        t = t.astype(g.dtype)
        if layout is None:
            m = b1 * m + (1 - b1) * g
            nu = b2 * nu + (1 - b2) * g * g
            return _ratio(m, nu, b1, b2, t + 1, eps), m, nu
        back = [q if isinstance(q, optax.MaskedNode) else q.mT for q in basis]
        first = t == 0
        m = jnp.where(first, m, b1 * m + (1 - b1) * g)
        square = sandwich(fold(g, layout), back[0], basis[1]) ** 2
        nu = jnp.where(first, nu, b2 * nu + (1 - b2) * square)
        u = _ratio(sandwich(fold(m, layout), back[0], basis[1]), nu, b1, b2, t, eps)
        u = jnp.where(first, jnp.zeros_like(u), sandwich(u, basis[0], back[1]))
        return unfold(u, layout), m, nu

    def update(updates, state, params=None, **extra):
        left, right = on_leaves(gather, axes, updates, state.left, state.right, outputs=2)
        moments = state.mu, state.nu, state.bases[key].basis
        direction, mu, nu = on_leaves(
            partial(adam, state.position), axes, updates, *moments, outputs=3
        )
        basis = _refreshed(state, (left, right), updates, refresh, axes)
        bases = {key: BasisState(basis)}
        return direction, SoapState(state.position + 1, mu, nu, left, right, bases)

    return widened(optax.GradientTransformationExtraArgs(init, update))


def _ratio(m: jax.Array, nu: jax.Array, b1: Any, b2: Any, t: jax.Array, eps: Any) -> jax.Array:
    """Adam's quotient after t updates of the moments."""
    return m / (1 - b1**t) / (jnp.sqrt(nu / (1 - b2**t)) + eps)


def _refreshed(
    state: SoapState, factors: tuple[PyTree, PyTree], like: PyTree, refresh: int, axes: Axes
) -> PyTree:
    """The bases for the next step: of the first gradient, moved on at the end of each period."""

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


def _orthogonal(matrix):
    return jnp.linalg.qr(matrix)[0]
