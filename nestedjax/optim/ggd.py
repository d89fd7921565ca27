"""Generalised gradient descent: a step of the weights by any objective and retention (spec B10)."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nestedjax.memory import objectives, retention
from nestedjax.memory.objectives import Objective
from nestedjax.memory.retention import Retention
from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, plus_identity, unfold, widened
from nestedjax.optim.memories import Memory
from nestedjax.optim.parts import choice
from nestedjax.optim.ranges import checked
from nestedjax.optim.types import (
    Count,
    Counter,
    Fraction,
    Leaf,
    LearningRate,
    Leaves,
    Matrices,
    NonNegative,
    Number,
)
from pallas_kernels import solve

OBJECTIVES = {"dot": objectives.dot, "l2": objectives.l2}
RETENTIONS = {"none": retention.none, "decay": retention.decay, "kl": retention.kl}
Solver = Literal["one_gd_step", "n_gd_steps", "closed_form"]


class GGDState(NamedTuple):
    """The state of `ggd` and `scale_by_gm`.

    Attributes:
      count: updates done, for a learning rate that is a schedule.
      accumulator: A, for a retention whose weights are a function of it, W = link(A); () for the
        others.
    """

    count: Counter  # type: ignore[assignment]  # hides tuple.count, as in optax
    accumulator: Leaves

    def memories(self) -> tuple[Memory, ...]:
        """Its box, where the weights are a function of an accumulator."""
        about = "dot with the gradient", "gradient step with decay"
        return (Memory("mirror accumulator", self.accumulator, *about),)


@checked
def ggd(
    learning_rate: LearningRate,
    *,
    objective: Literal["dot", "l2"] | Objective = "dot",
    retain: Literal["none", "decay", "kl"] | Retention = "none",
    decay: Fraction = 1.0,
    solver: Solver = "one_gd_step",
    inner_steps: Count = 100,
    inner_learning_rate: NonNegative = 0.1,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`W <- argmin L(W x; u) + Ret(W, W_t)`, u = -dL/dy: the target each layer makes itself.

    (dot, none) is gradient descent, (dot, decay) with weight decay, (l2, none) is DGD, (dot, kl)
    exponentiated gradient; objectives and retentions are those of `nestedjax.memory`.

    Args:
      learning_rate: a number or a schedule: the inverse strength of the retention.
      objective: inner loss L: "dot", "l2", or an `Objective`.
      retain: regulariser Ret: "none", "decay", "kl", or a `Retention`; one that maps an accumulator
        to the weights needs initial weights of its kind (for kl positive rows of sum `scale`).
      decay: factor on the weights in one step, for the retentions that use it; 1 for none. It is
        this rule's own weight decay.
      solver: how the minimum is found: "one_gd_step" from W_t, "n_gd_steps" on the whole problem,
        or in "closed_form".
      inner_steps: steps of "n_gd_steps".
      inner_learning_rate: step size of "n_gd_steps", relative to the learning rate: each step is
        `inner_learning_rate learning_rate` times the gradient of the whole problem.
      axes: how weights are matrices; see `m3`.

    Returns:
      A transformation that needs `params`. Objectives other than dot need two more trees like the
      parameters, `update(grads, state, params, inputs=, errors=)`: each layer's inputs [..., n, di]
      and the mean loss's gradient by its outputs [..., n, do], as `recorded_linear` gives them.
      With `optax.inject_hyperparams` name `inner_steps` and functions in `static_args`.

    Raises:
      ValueError: an objective, retention and solver that do not go together; inputs that are
        missing for a parameter, by name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> tx, w = optim.ggd(0.5, retain="decay", decay=0.9), jnp.ones((2, 2))
      >>> tx.update(w, tx.init(w), w)[0].round(3).tolist()
      [[-0.6000000238418579, -0.6000000238418579], [-0.6000000238418579, -0.6000000238418579]]

    Reference:
      Nested Learning (arXiv 2512.24695), definition 5; spec B10.

    Departure from the paper: its sentence on the self-generated targets says keys where u, the
    value, is meant.
    """
    objective, retain = _menus(objective, retain)
    choice("solver", solver, get_args(Solver))
    _check_solver(objective, retain, solver)
    decay = 1.0 if retain.decay == "unused" else decay
    rule = _Step(objective, retain, decay, solver, inner_steps, inner_learning_rate)

    def init(params: Leaves) -> GGDState:
        return GGDState(jnp.zeros((), jnp.int32), _accumulators(retain, params, axes))

    def update(updates, state, params=None, *, inputs=None, errors=None, **extra):
        if params is None:
            raise ValueError("ggd needs the parameters: tx.update(grads, state, params)")
        now = learning_rate(state.count) if callable(learning_rate) else learning_rate
        nothing = jax.tree.map(lambda g: None, updates)
        trees = (nothing if tree is None else tree for tree in (inputs, errors))
        held = state.accumulator if retain.link is not None else params

        def one(layout: Layout | None, g: Leaf, w, a, x, error) -> tuple[Leaf, Leaf]:
            if layout is None:
                return rule.elementwise(w, a, g, now)
            w, g, a = (fold(array, layout) for array in (w, g, a))
            new, a = rule.matrix(layout, w, a, g, x, error, now)
            return unfold(new - w, layout), unfold(a, layout)

        updates, held = on_leaves(one, axes, updates, params, held, *trees, outputs=2)
        return updates, GGDState(state.count + 1, held if retain.link is not None else ())

    return widened(optax.GradientTransformationExtraArgs(init, update))


@checked
def scale_by_gm(
    *,
    inner_learning_rate: NonNegative = 1.0,
    objective: Literal["dot", "l2"] | Objective = "dot",
    retain: Literal["none", "decay"] | Retention = "decay",
    decay: Fraction = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Generalised momentum: `m <- argmin L(m; -g) + Ret(m, m_t)` by one step; returns -m.

    (dot, decay) is momentum. The rows of a gradient are the values, their indices the keys.

    Args:
      inner_learning_rate: step size of the momentum.
      objective: inner loss L: "dot", "l2", or an `Objective` of a residual m - v.
      retain: regulariser Ret: "none", "decay", or a `Retention` without a link, since a memory of
        gradients has entries of both signs.
      decay: factor on the momentum in one step, for the retentions that use it.

    Raises:
      ValueError: a retention whose weights are a function of an accumulator.

    Reference:
      Nested Learning (arXiv 2512.24695), definition 5; spec B10.
    """
    objective, retain = _menus(objective, retain)
    if retain.link is not None:
        raise ValueError(f"retain={retain.name!r} keeps weights of one sign; use none or decay")
    decay = 1.0 if retain.decay == "unused" else decay

    def init(params: Leaves) -> optax.TraceState:
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None, **extra):
        def one(m: Leaf, g: Leaf) -> Leaf:
            error = objective.error(jnp.atleast_1d(m), -jnp.atleast_1d(g), None).reshape(m.shape)
            m = decay * m - inner_learning_rate * error
            if retain.shrink is None:
                return m
            return retain.shrink(m, jnp.asarray(inner_learning_rate, m.dtype))

        trace = jax.tree.map(one, state.trace, updates)
        return jax.tree.map(jnp.negative, trace), optax.TraceState(trace)

    return widened(optax.GradientTransformationExtraArgs(init, update))


class _Step(NamedTuple):
    """One step of one matrix."""

    objective: Objective
    retention: Retention
    decay: Number
    solver: Solver
    inner_steps: int
    inner_learning_rate: Number

    def elementwise(self, w: Leaf, a: Leaf, g: Leaf, learning_rate: Number) -> tuple[Leaf, Leaf]:
        """What is no matrix has no inputs, and so the dot objective: update and accumulator."""
        new, a = self.write(w, a, g, learning_rate)
        return new - w, a

    def write(self, w: Leaf, a: Leaf, slope: Leaf, learning_rate: Number) -> tuple[Leaf, Leaf]:
        """Weights and accumulator after a step along a gradient."""
        a = self.decay * a - learning_rate * slope
        if self.retention.shrink is not None:
            a = self.retention.shrink(a, jnp.asarray(learning_rate, a.dtype))
        return _linked(self.retention, a), a

    def matrix(
        self,
        layout: Layout,
        w: Matrices,
        a: Matrices,
        g: Matrices,
        x: Float[Array, "*stack n inputs"] | None,
        error: Float[Array, "*stack n outputs"] | None,
        learning_rate: Number,
    ) -> tuple[Matrices, Matrices]:
        """Weights and accumulator after the step of the chosen solver."""
        if self.objective.name == "dot":
            if self.solver == "n_gd_steps":
                return self.descend(w, lambda z: g, learning_rate)
            return self.write(w, a, g, learning_rate)
        if x is None or error is None:
            raise ValueError(
                f"objective {self.objective.name!r} needs inputs= and errors= of {layout.name!r}"
            )
        # errors are those of a mean over the inputs: n times them is each input's own.
        count = x.shape[-2]
        x, u = x.astype(w.dtype), -count * error.astype(w.dtype)

        def slope(z: Matrices) -> Matrices:
            return self.objective.error(x @ z.mT, u, None).mT @ x / count

        if self.solver == "one_gd_step":
            return self.write(w, a, slope(w), learning_rate)
        if self.solver == "n_gd_steps":
            return self.descend(w, slope, learning_rate)
        assert self.objective.factor is not None  # closed_form was refused without
        # W (I + c X^T X) = decay W_t + c U^T X, with c = learning_rate factor / n, whose matrix is
        # symmetric with eigenvalues of at least 1.
        factor = learning_rate * self.objective.factor / count
        right = self.decay * w + factor * u.mT @ x
        new = solve(plus_identity(factor * (x.mT @ x)), right.mT).mT
        return new, new

    def descend(
        self, w: Matrices, slope: Callable[[Matrices], Matrices], learning_rate: Number
    ) -> tuple[Matrices, Matrices]:
        """Many steps on objective + |W - decay W_t|^2 / (2 learning_rate)."""

        def step(_, z: Matrices) -> Matrices:
            whole = learning_rate * slope(z) + z - self.decay * w
            return z - self.inner_learning_rate * whole

        z = jax.lax.fori_loop(0, self.inner_steps, step, w)
        return z, z


def _menus(objective: str | Objective, retain: str | Retention) -> tuple[Objective, Retention]:
    if not isinstance(objective, Objective):
        objective = OBJECTIVES[choice("objective", objective, tuple(OBJECTIVES))]()
    if not isinstance(retain, Retention):
        retain = RETENTIONS[choice("retain", retain, tuple(RETENTIONS))]()
    if objective.token_threshold or objective.penalty is not None:
        raise ValueError(
            f"objective {objective.name!r} needs thresholds or keys, which an optimizer does not"
            " have; use one with a fixed threshold"
        )
    return objective, retain


def _check_solver(objective: Objective, retain: Retention, solver: Solver) -> None:
    quadratic = retain.link is None and retain.shrink is None
    if solver == "n_gd_steps" and not quadratic:
        raise ValueError(f"solver='n_gd_steps' knows none and decay, not retain={retain.name!r}")
    exact = objective.name == "dot" or (objective.factor is not None and quadratic)
    if solver == "closed_form" and not exact:
        raise ValueError(
            f"no closed form of objective {objective.name!r} with retain={retain.name!r}: it exists"
            " for dot, and for l2 with none or decay; use one_gd_step"
        )


def _linked(retain: Retention, a: Leaf) -> Leaf:
    """`link` of each matrix."""
    if retain.link is None:
        return a
    link = retain.link
    for _ in a.shape[:-2]:
        link = jax.vmap(link)
    return link(a) if a.ndim else link(a[None])[0]


def _accumulators(retain: Retention, params: Leaves, axes: Axes) -> Leaves:
    """A with link(A) = W, for the links that have an inverse; () for a retention without a link.

    Raises:
      ValueError: this one has none.
    """
    if retain.link is None:
        return ()
    inverses = {
        "kl": jnp.log,
        "bregman_sigmoid": lambda w: jnp.log(w) - jnp.log1p(-w),
    }
    if retain.name not in inverses:
        raise ValueError(
            f"retain={retain.name!r}: no way from weights back to its accumulator; use one of"
            f" none, decay, elastic_net, {', '.join(inverses)}"
        )

    def one(layout: Layout | None, w: Leaf) -> tuple[Leaf]:
        return (inverses[retain.name](w),)

    return on_leaves(one, axes, params)[0]
