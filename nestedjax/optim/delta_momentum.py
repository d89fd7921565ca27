"""Delta momentum: a memory that erases what it holds about the present gradient (spec B4)."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, plus_identity, unfold, widened
from nestedjax.optim.memories import Memory, Part, momentum
from nestedjax.optim.parts import add_decay, choice, matrices_in
from nestedjax.optim.preconditioned_momentum import Preconditioner, preconditioners
from nestedjax.optim.ranges import Range, checked
from nestedjax.optim.types import (
    Fraction,
    Leaf,
    LearningRate,
    Leaves,
    Matrices,
    NonNegative,
    Number,
    PyTree,
)
from pallas_kernels import norm, solve, unit

VectorAs = Literal["elementwise", "row", "col"]

_POWER_STEPS = 8


class DeltaMomentumState(NamedTuple):
    """The state of `scale_by_delta_momentum`.

    Attributes:
      trace: the momentum m.
      write: the state of the preconditioner P.
    """

    trace: Leaves
    write: PyTree

    def memories(self) -> tuple[Memory | Part, ...]:
        """Its boxes: the momentum, and what its preconditioner remembers."""
        return momentum(self.trace), Part(self.write)


@checked
def delta_momentum(
    learning_rate: LearningRate,
    *,
    decay: Fraction = 0.9,
    erase: NonNegative = 0.5,
    preconditioner: Preconditioner = "identity",
    normalize_key: bool = True,
    implicit: bool = False,
    key: Literal["gradient", "rank1"] = "gradient",
    vector_as: VectorAs = "elementwise",
    weight_decay: NonNegative = 0.1,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum by one step on `1/2 |m k^T + P|_F^2`, for parameters of any shape.

        m <- m (decay I - erase k^T k) - lr P(g),     W <- W + m - lr weight_decay W

    with m, g [outputs, inputs] and the key k = g / |g|_F. With `implicit` the minimum takes the
    place of the step: `m <- (decay m - lr P(g)) (I + erase k^T k)^-1`.

    Args:
      learning_rate: a number or a schedule, inside of the memory: a gradient keeps the learning
        rate of its own step.
      decay: decay of the momentum, in one step.
      erase: rate zeta at which the momentum forgets along the present gradient; at most `decay` in
        the explicit form with normalised keys, which keeps the eigenvalues of the map m -> m (decay
        I - erase k^T k) in [decay - erase, decay].
      preconditioner: operator P on the gradients that are stored: "identity", "diagonal",
        "shampoo", "soap", "learned", or any transformation; see `preconditioned_momentum`.
      normalize_key: whether the key is divided by its Frobenius norm; False: k = g as printed, with
        which the explicit form diverges where |g|^2 > 2 / erase.
      implicit: whether to solve for the exact minimum, which is stable with any erase >= 0.
      key: what erases: the whole "gradient", or "rank1", only its largest singular direction, which
        is cheaper.
      vector_as: how parameters that are no matrices are read: "elementwise" m (decay - erase k^2),
        as a "row" m decay - erase (m.k) k, or as a "col" m (decay - erase |k|^2).
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      axes: which parameters are matrices, and how; see `m3`.

    Returns:
      A transformation. With `optax.inject_hyperparams` name functions in `static_args`.

    Raises:
      ValueError: an argument out of range, or axes that do not fit a parameter, by its name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.delta_momentum(0.1)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Nested Learning (arXiv 2512.24695), equations 48-49; spec B4.

    Departures from the paper:
      1. The target is -P (no argument): the printed +P climbs.
      2. k^T k multiplies from the right (no argument); NeurIPS multiplies by g^T g from the left,
         which has the right shape for square matrices only.
      3. The key is normalised (`normalize_key`): |g|^2 has no bound, so that the printed step
         diverges on large gradients and does nothing on small ones.
      4. `erase` is separate from the learning rate; the paper has erase = 1.
    """
    write = optax.chain(
        preconditioners(preconditioner, axes), optax.scale_by_learning_rate(learning_rate)
    )
    rule = scale_by_delta_momentum(
        decay=decay,
        erase=erase,
        preconditioner=write,
        normalize_key=normalize_key,
        implicit=implicit,
        key=key,
        vector_as=vector_as,
        axes=axes,
    )
    shrink = add_decay(learning_rate, weight_decay, mask=matrices_in(axes))
    return widened(optax.chain(rule, shrink))


@checked
def scale_by_delta_momentum(
    *,
    decay: Fraction = 0.9,
    erase: NonNegative = 0.5,
    preconditioner: Preconditioner = "identity",
    normalize_key: bool = True,
    implicit: bool = False,
    key: Literal["gradient", "rank1"] = "gradient",
    vector_as: VectorAs = "elementwise",
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`m <- m (decay I - erase k^T k) + P(g)` of `delta_momentum`, whose arguments these are."""
    if normalize_key and not implicit and isinstance(decay, int | float):
        Range(0, decay).check("erase", erase)
    choice("key", key, ("gradient", "rank1"))
    choice("vector_as", vector_as, get_args(VectorAs))
    write = preconditioners(preconditioner, axes)

    def remember(layout: Layout | None, g: Leaf, value: Leaf, m: Leaf) -> tuple[Leaf]:
        arrays, back = _as_matrices(layout, vector_as, g, value, m)
        keys, value, m = arrays
        if normalize_key:
            keys = unit(keys, None if back is None else (-2, -1))
        if back is None:
            return (_elementwise(m, keys, value, decay, erase, implicit),)
        if key == "rank1":
            keys = _largest(keys)
        step = _implicit if implicit else _explicit
        return (back(step(m, keys, value, decay, erase)),)

    def init(params: Leaves) -> DeltaMomentumState:
        return DeltaMomentumState(jax.tree.map(jnp.zeros_like, params), write.init(params))

    def update(updates, state, params=None, **extra):
        values, written = write.update(updates, state.write, params, **extra)
        (trace,) = on_leaves(remember, axes, updates, values, state.trace)
        return trace, DeltaMomentumState(trace, written)

    return widened(optax.GradientTransformationExtraArgs(init, update))


def _as_matrices(
    layout: Layout | None, vector_as: VectorAs, *arrays: Leaf
) -> tuple[list[Leaf], Callable[[Leaf], Leaf] | None]:
    """The arrays as matrices [..., outputs, inputs], and the way back; None for elementwise."""
    if layout is not None:
        return [fold(a, layout) for a in arrays], lambda m: unfold(m, layout)
    if vector_as == "elementwise":
        return list(arrays), None
    shape = (1, -1) if vector_as == "row" else (-1, 1)
    return [a.reshape(shape) for a in arrays], lambda m: m.reshape(arrays[0].shape)


def _elementwise(
    m: Leaf, k: Leaf, value: Leaf, decay: Number, erase: Number, implicit: bool
) -> Leaf:
    if implicit:
        return (decay * m + value) / (1 + erase * k * k)
    return m * (decay - erase * k * k) + value


def _explicit(
    m: Matrices,
    k: Float[Array, "*stack rows inputs"],
    value: Matrices,
    decay: Number,
    erase: Number,
) -> Matrices:
    """`m (decay I - erase k^T k) + value`."""
    rows, columns = k.shape[-2:]
    # The same product in the order that needs fewer operations and the smaller intermediate.
    seen = (m @ k.mT) @ k if rows <= columns else m @ (k.mT @ k)
    return decay * m - erase * seen + value


def _implicit(
    m: Matrices,
    k: Float[Array, "*stack rows inputs"],
    value: Matrices,
    decay: Number,
    erase: Number,
) -> Matrices:
    """`B (I + erase k^T k)^-1` with `B = decay m + value`, solved on the smaller side of k.

    By Woodbury, `(I + z k^T k)^-1 = I - z k^T (I + z k k^T)^-1 k`. Both matrices that are solved
    are symmetric with eigenvalues of at least 1, and at most 1 + erase where keys are normalised:
    no pivoting or damping is needed.
    """
    b = decay * m + value
    rows, columns = k.shape[-2:]
    if rows < columns:
        small = plus_identity(erase * (k @ k.mT))
        return b - erase * (b @ k.mT) @ solve(small, k)
    small = plus_identity(erase * (k.mT @ k))
    return solve(small, b.mT).mT


def _largest(k: Matrices) -> Float[Array, "*stack 1 inputs"]:
    """The row s v^T of the largest singular value s, by power iteration.

    It begins at the row with the largest norm, which has a part along v unless it is orthogonal to
    it; the error falls by (s2 / s)^2 in each of the 8 steps, with s2 the second singular value.
    """
    sizes = norm(k, -1)
    v = jnp.take_along_axis(k, jnp.argmax(sizes, axis=-2, keepdims=True), axis=-2)

    def step(_, v: Leaf) -> Leaf:
        return (unit(v, (-2, -1)) @ k.mT) @ k

    v = unit(jax.lax.fori_loop(0, _POWER_STEPS, step, v), (-2, -1))
    return norm(v @ k.mT, (-2, -1)) * v
