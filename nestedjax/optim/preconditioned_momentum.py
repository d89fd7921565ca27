"""Momentum as an associative memory, with any operator on the gradients it stores (spec B2, B3)."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nestedjax.optim.features import Features, NamedFeatures, on_features
from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, unfold, widened
from nestedjax.optim.memories import Memory
from nestedjax.optim.parts import add_decay, choice, lenient, matrices_in, polar
from nestedjax.optim.ranges import Range, checked
from nestedjax.optim.shampoo import scale_by_shampoo
from nestedjax.optim.soap import scale_by_soap
from nestedjax.optim.types import (
    Fraction,
    Leaf,
    LearningRate,
    Leaves,
    MatrixFunction,
    NonNegative,
    Number,
    PyTree,
)
from pallas_kernels import unit

Preconditioner: TypeAlias = (
    Literal["identity", "diagonal", "shampoo", "soap", "learned"] | optax.GradientTransformation
)


@checked
def preconditioned_momentum(
    learning_rate: LearningRate,
    *,
    decay: Fraction = 0.9,
    preconditioner: Preconditioner = "diagonal",
    features: NamedFeatures | Features = "identity",
    weight_decay: NonNegative = 0.1,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum that stores preconditioned gradients, for parameters of any shape.

        m <- decay m - lr P(phi(g)),    W <- W + m - lr weight_decay W

    The inner objective of m is `<m, P g> + (decay |m - m_t|^2 + (1 - decay) |m|^2) / (2 lr)`.

    Args:
      learning_rate: a number or a schedule, inside of the memory: a gradient keeps the learning
        rate of its own step.
      decay: decay of the momentum, in one step; the last n gradients have the weight 1 - decay^n.
      preconditioner: operator P on the gradients that are stored: "identity" (plain momentum),
        "diagonal" (`1 / (sqrt(v) + 1e-8)` with v a bias-corrected moving average of g^2),
        "shampoo", "soap", "learned" (`scale_by_learned_preconditioner`), or any transformation,
        such as `scale_by_matrix`.
      features: map phi of a gradient before it is stored: "identity", "sign", "normalized"
        (g / (|g| + 1e-8)), or one of `nestedjax.optim.features`.
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
      >>> tx = optim.preconditioned_momentum(0.1, preconditioner="identity", weight_decay=0.0)
      >>> tx.update(params, tx.init(params), params)[0]["kernel"][0].tolist()
      [-0.10000000149011612, -0.10000000149011612, -0.10000000149011612]

    Reference:
      Nested Learning (arXiv 2512.24695), equations 33, 46, 47, 51; spec B2, B3 and B6.

    Departure from the paper: the NeurIPS version prints W - m together with m - lr g, which climbs;
    the sign here is that of equation 33.
    """
    memory = optax.chain(
        preconditioners(preconditioner, axes),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(decay),
    )
    shrink = add_decay(learning_rate, weight_decay, mask=matrices_in(axes))
    return widened(optax.chain(on_features(memory, features, axes), shrink))


@checked
def scale_by_preconditioned_momentum(
    *,
    decay: Fraction = 0.9,
    preconditioner: Preconditioner = "diagonal",
    features: NamedFeatures | Features = "identity",
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`m <- decay m + P(phi(g))` of `preconditioned_momentum`, whose arguments these are."""
    memory = optax.chain(preconditioners(preconditioner, axes), optax.trace(decay))
    return widened(on_features(memory, features, axes))


def preconditioners(name: Preconditioner, axes: Axes) -> optax.GradientTransformationExtraArgs:
    """The transformation that a preconditioner's name stands for.

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(name, optax.GradientTransformation):
        return optax.with_extra_args_support(name)
    known: dict[str, Callable[[], optax.GradientTransformation]] = {
        "identity": optax.identity,
        "diagonal": lambda: optax.scale_by_rms(0.99, 1e-8, eps_in_sqrt=False, bias_correction=True),
        "shampoo": lambda: scale_by_shampoo(axes=axes),
        "soap": lambda: scale_by_soap(b1=0.0, axes=axes),
        "learned": lambda: scale_by_learned_preconditioner(axes=axes),
    }
    return lenient(known[choice("preconditioner", name, tuple(known))]())


def scale_by_matrix(matrix: PyTree, *, axes: Axes = None) -> optax.GradientTransformation:
    """`P g` with a fixed P [outputs, outputs], the same for a whole stack.

    Args:
      matrix: P for every leaf, or a tree like the parameters with one P for each leaf. On a leaf
        that is no matrix, P acts as on a flat vector.
      axes: which parameters are matrices, and how; see `m3`.

    Reference:
      Nested Learning (arXiv 2512.24695), equations 46-47; spec B3.
    """

    def one(layout: Layout | None, g: Leaf, p: Float[Array, "n n"]) -> tuple[Leaf]:
        if layout is None:
            return ((p @ g.reshape(-1)).reshape(g.shape),)
        return (unfold(p @ fold(g, layout), layout),)

    def scale(updates: PyTree, params: PyTree = None) -> PyTree:
        alone = isinstance(matrix, jax.Array)
        each = jax.tree.map(lambda _: matrix, updates) if alone else matrix
        return on_leaves(one, axes, updates, each)[0]

    return optax.stateless(scale)


class LearnedState(NamedTuple):
    """The state of `scale_by_learned_preconditioner`: one P for each matrix."""

    operator: PyTree[Float[Array, "*stack outputs outputs"]]

    def memories(self) -> tuple[Memory, ...]:
        """Its box."""
        return (
            Memory("preconditioner", self.operator, "l2 from gradient to target", "delta rule"),
        )


@checked
def scale_by_learned_preconditioner(
    *,
    inner_learning_rate: Annotated[Number, Range(0, 2)] = 0.1,
    target: MatrixFunction = polar,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`P g` with P learned by an inner level from pairs (g, target(g)) by the delta rule.

        P <- P - inner_learning_rate (P k - v) k^T,    k = g / |g|_F,  v = target(g) / |target(g)|_F

    from P = I. Leaves that are no matrices pass unchanged.

    Args:
      inner_learning_rate: step size of P, in [0, 2]; with |k|_F = 1 a larger one diverges.
      target: function of matrices [..., outputs, inputs]; by default the orthogonal factor, which P
        then approximates by a linear map.
      axes: which parameters are matrices, and how; see `m3`.

    Reference:
      Nested Learning (arXiv 2512.24695), equation 41; spec B3.

    Departure from the paper: it names the inner problem and leaves objective and target open; both
    are choices made here.
    """

    def init(params: Leaves) -> LearnedState:
        def one(layout: Layout | None, p: Leaf) -> tuple[Any]:
            if layout is None:
                return (optax.MaskedNode(),)
            rows = layout.matrix[-2]
            shape = (*layout.matrix[:-2], rows, rows)
            return (jnp.broadcast_to(jnp.eye(rows, dtype=p.dtype), shape),)

        return LearnedState(on_leaves(one, axes, params)[0])

    def update(updates, state, params=None, **extra):
        def one(layout: Layout | None, g: Leaf, p: Any) -> tuple[Leaf, Any]:
            if layout is None:
                return g, p
            gradient = fold(g, layout)
            key, value = (unit(m, (-2, -1)) for m in (gradient, target(gradient)))
            p = p - inner_learning_rate * (p @ key - value) @ key.mT
            return unfold(p @ gradient, layout), p

        updates, operator = on_leaves(one, axes, updates, state.operator, outputs=2)
        return updates, LearnedState(operator)

    return widened(optax.GradientTransformationExtraArgs(init, update))
