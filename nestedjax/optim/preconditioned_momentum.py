"""Momentum as an associative memory, with any operator on the gradients it stores (spec B2, B3)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestedjax.optim.features import Features, on_features
from nestedjax.optim.matrices import Axes, fold, on_leaves, unfold, widened
from nestedjax.optim.memories import Memory
from nestedjax.optim.parts import PyTree, Rate, add_decay, choice, lenient, number, polar
from nestedjax.optim.shampoo import scale_by_shampoo
from nestedjax.optim.soap import scale_by_soap

Preconditioner = Any  # a name or an optax.GradientTransformation


def preconditioned_momentum(
    learning_rate: Rate,
    *,
    decay: Any = 0.9,
    preconditioner: Preconditioner = "diagonal",
    features: str | Features = "identity",
    weight_decay: Any = 0.0,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum that stores preconditioned gradients, for parameters of any shape.

        m <- decay m - lr P(phi(g)),    W <- W + m - lr weight_decay W

    The inner objective of m is `<m, P g> + (decay |m - m_t|^2 + (1 - decay) |m|^2) / (2 lr)`.

    Args:
      learning_rate: a rate or schedule, inside the memory: a gradient keeps the rate of its step.
      decay: of the momentum; 1 - decay^n is the weight of the last n gradients.
      preconditioner: "identity" (plain momentum), "diagonal" (`1 / (sqrt(v) + 1e-8)`, v a
        bias-corrected moving average of g^2), "shampoo", "soap", "learned"
        (`scale_by_learned_preconditioner`), or any transformation, such as `scale_by_matrix`.
      features: "identity", "sign", "normalized", or one of `nestedjax.optim.features`.
      weight_decay: decoupled, of every parameter.
      axes: which parameters are matrices, and how, for the preconditioners that ask; see `m3`.

    Raises:
      ValueError: an argument out of range, or axes that do not fit a parameter, by its name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.preconditioned_momentum(0.1, preconditioner="identity")
      >>> tx.update(params, tx.init(params), params)[0]["kernel"][0].tolist()
      [-0.10000000149011612, -0.10000000149011612, -0.10000000149011612]

    Reference:
      Nested Learning (arXiv 2512.24695), equations 33, 46, 47, 51.

    Departure from the paper: the NeurIPS version prints W - m together with m - lr g, which climbs;
    the sign here is that of equation 33.
    """
    number("decay", decay)
    memory = optax.chain(
        preconditioners(preconditioner, axes),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(decay),
    )
    return widened(
        optax.chain(on_features(memory, features, axes), add_decay(learning_rate, weight_decay))
    )


def scale_by_preconditioned_momentum(
    *,
    decay: Any = 0.9,
    preconditioner: Preconditioner = "diagonal",
    features: str | Features = "identity",
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`m <- decay m + P(phi(g))` of `preconditioned_momentum`, whose arguments these are."""
    number("decay", decay)
    memory = optax.chain(preconditioners(preconditioner, axes), optax.trace(decay))
    return widened(on_features(memory, features, axes))


def preconditioners(name: Preconditioner, axes: Axes) -> optax.GradientTransformationExtraArgs:
    """The transformation that a name stands for.

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
      matrix: P for every leaf, or a tree like the parameters of one P a leaf. For a leaf that is no
        matrix, P acts on it flattened.
      axes: see `m3`.
    """

    def one(layout: Any, g: jax.Array, p: jax.Array) -> tuple[jax.Array]:
        if layout is None:
            return ((p @ g.reshape(-1)).reshape(g.shape),)
        return (unfold(p @ fold(g, layout), layout),)

    def scale(updates: PyTree, params: PyTree = None) -> PyTree:
        alone = isinstance(matrix, jax.Array)
        each = jax.tree.map(lambda _: matrix, updates) if alone else matrix
        return on_leaves(one, axes, updates, each)[0]

    return optax.stateless(scale)


class LearnedState(NamedTuple):
    """The state of `scale_by_learned_preconditioner`: one P [..., outputs, outputs] a matrix."""

    operator: PyTree

    def memories(self) -> tuple[Memory, ...]:
        """Its box."""
        return (
            Memory("preconditioner", self.operator, "l2 from gradient to target", "delta rule"),
        )


def scale_by_learned_preconditioner(
    *,
    rate: Any = 0.1,
    target: Callable[[jax.Array], jax.Array] = polar,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`P g` with P learned by an inner level from pairs (g, target(g)) by the delta rule.

        P <- P - rate (P k - v) k^T,    k = g / |g|_F,  v = target(g) / |target(g)|_F

    from P = I; the result is `P g`. Leaves that are no matrices pass unchanged.

    Args:
      rate: inner learning rate, in (0, 2).
      target: of matrices [..., outputs, inputs]; the default is the orthogonal factor, so that P
        becomes a linear stand-in for it.
      axes: see `m3`.

    Reference:
      Nested Learning (arXiv 2512.24695), equation 41, which names the inner problem and leaves
      objective and target open: both are choices made here.
    """
    number("rate", rate, 0.0, 2.0)

    def init(params: PyTree) -> LearnedState:
        def one(layout: Any, p: jax.Array) -> tuple[Any]:
            if layout is None:
                return (optax.MaskedNode(),)
            rows = layout.matrix[-2]
            shape = (*layout.matrix[:-2], rows, rows)
            return (jnp.broadcast_to(jnp.eye(rows, dtype=p.dtype), shape),)

        return LearnedState(on_leaves(one, axes, params)[0])

    def update(updates, state, params=None, **extra):
        def one(layout: Any, g: jax.Array, p: Any) -> tuple[Any, Any]:
            if layout is None:
                return g, p
            gradient = fold(g, layout)
            key, value = _unit(gradient), _unit(target(gradient))
            p = p - rate * (p @ key - value) @ key.mT
            return unfold(p @ gradient, layout), p

        updates, operator = on_leaves(one, axes, updates, state.operator, outputs=2)
        return updates, LearnedState(operator)

    return widened(optax.GradientTransformationExtraArgs(init, update))


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-12)
