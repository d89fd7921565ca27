"""Generalised gradient descent: any objective and any retention for a step of the weights (B10)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestedjax.memory import objectives, retention
from nestedjax.memory.objectives import Objective
from nestedjax.memory.retention import Retention
from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, plus_identity, unfold, widened
from nestedjax.optim.parts import PyTree, Rate, choice, number
from pallas_kernels import solve

OBJECTIVES = {"dot": objectives.dot, "l2": objectives.l2}
RETENTIONS = {"none": retention.none, "decay": retention.decay, "kl": retention.kl}


class GGDState(NamedTuple):
    """The state of `ggd` and `scale_by_gm`.

    Attributes:
      position: updates done, for a learning rate that is a schedule.
      accumulator: A of a retention with W = link(A); () for the others.
    """

    position: jax.Array  # shape=(), dtype=int32
    accumulator: PyTree


def ggd(
    learning_rate: Rate,
    *,
    objective: str | Objective = "dot",
    retain: str | Retention = "none",
    keep: Any = 1.0,
    solver: str = "one_gd_step",
    inner_steps: int = 100,
    inner_rate: Any = 0.1,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`W <- argmin L(W x; u) + Ret(W, W_t)`, u = -dL/dy: the target each layer makes itself.

    (dot, none) is gradient descent, (dot, decay) with weight decay, (l2, none) is DGD, (dot, kl)
    exponentiated gradient; objectives and retentions are those of `nestedjax.memory`.

    Args:
      learning_rate: a rate or schedule: 1 / strength of the retention.
      objective: "dot", "l2", or an `Objective`.
      retain: "none", "decay", "kl", or a `Retention`. One that maps an accumulator to the weights
        needs initial weights of its kind: positive rows of sum `scale` for kl.
      keep: fraction kept, for the retentions that use it.
      solver: "one_gd_step" from W_t; "n_gd_steps" on the whole problem; "closed_form".
      inner_steps: of "n_gd_steps".
      inner_rate: of "n_gd_steps", relative to the learning rate: each step is
        `inner_rate learning_rate` times the gradient of the whole problem.
      axes: how weights are matrices; see `m3`.

    Returns:
      A transformation that needs `params`. Objectives other than dot need two more trees like the
      parameters, `update(grads, state, params, inputs=, errors=)`: each layer's inputs [..., n, di]
      and the mean loss's gradient by its outputs [..., n, do], as `recorded_linear` gives them.

    Raises:
      ValueError: an objective, retention and solver that do not go together; inputs that are
        missing for a parameter, by name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> tx, w = optim.ggd(0.5, retain="decay", keep=0.9), jnp.ones((2, 2))
      >>> tx.update(w, tx.init(w), w)[0].round(3).tolist()
      [[-0.6000000238418579, -0.6000000238418579], [-0.6000000238418579, -0.6000000238418579]]

    Reference:
      Nested Learning (arXiv 2512.24695), definition 5.

    Departure from the paper: its sentence on the self-generated targets says keys where u, the
    value, is meant.
    """
    objective, retain = _menus(objective, retain)
    choice("solver", solver, ("one_gd_step", "n_gd_steps", "closed_form"))
    number("keep", keep)
    _check_solver(objective, retain, solver)
    keep = 1.0 if retain.decay == "unused" else keep
    rule = _Step(objective, retain, keep, solver, inner_steps, inner_rate)

    def init(params: PyTree) -> GGDState:
        return GGDState(jnp.zeros((), jnp.int32), _accumulators(retain, params, axes))

    def update(updates, state, params=None, *, inputs=None, errors=None, **extra):
        if params is None:
            raise ValueError("ggd needs the parameters: tx.update(grads, state, params)")
        rate = learning_rate(state.position) if callable(learning_rate) else learning_rate
        nothing = jax.tree.map(lambda g: None, updates)
        trees = (nothing if tree is None else tree for tree in (inputs, errors))
        held = state.accumulator if retain.link is not None else params

        def one(layout: Layout | None, g: jax.Array, w, a, x, error) -> tuple[Any, Any]:
            if layout is None:
                return rule.elementwise(w, a, g, rate)
            w, g, a = (fold(array, layout) for array in (w, g, a))
            new, a = rule.matrix(layout, w, a, g, x, error, rate)
            return unfold(new - w, layout), unfold(a, layout)

        updates, held = on_leaves(one, axes, updates, params, held, *trees, outputs=2)
        return updates, GGDState(state.position + 1, held if retain.link is not None else ())

    return widened(optax.GradientTransformationExtraArgs(init, update))


def scale_by_gm(
    *,
    rate: Any = 1.0,
    objective: str | Objective = "dot",
    retain: str | Retention = "decay",
    keep: Any = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Generalised momentum: `m <- argmin L(m; -g) + Ret(m, m_t)` by one step; returns -m.

    (dot, decay) is momentum; the rows of a gradient are the values, its row numbers the keys.

    Args:
      rate: inner learning rate.
      objective: "dot", "l2", or an `Objective` of a residual m - v.
      retain: "none", "decay", or a `Retention` without link (a memory of gradients has signs).
      keep: fraction kept.

    Raises:
      ValueError: a retention whose weights are a function of an accumulator.
    """
    objective, retain = _menus(objective, retain)
    if retain.link is not None:
        raise ValueError(f"retain={retain.name!r} keeps weights of one sign; use none or decay")
    keep = 1.0 if retain.decay == "unused" else keep

    def init(params: PyTree) -> optax.TraceState:
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None, **extra):
        def one(m: jax.Array, g: jax.Array) -> jax.Array:
            error = objective.error(jnp.atleast_1d(m), -jnp.atleast_1d(g), None).reshape(m.shape)
            m = keep * m - rate * error
            return m if retain.shrink is None else retain.shrink(m, jnp.asarray(rate, m.dtype))

        trace = jax.tree.map(one, state.trace, updates)
        return jax.tree.map(jnp.negative, trace), optax.TraceState(trace)

    return widened(optax.GradientTransformationExtraArgs(init, update))


class _Step(NamedTuple):
    """One step of one matrix."""

    objective: Objective
    retention: Retention
    keep: Any
    solver: str
    inner_steps: int
    inner_rate: Any

    def elementwise(self, w: jax.Array, a: jax.Array, g: jax.Array, rate: Any):
        """What is no matrix has no inputs: the dot objective."""
        new, a = self.write(w, a, g, rate)
        return new - w, a

    def write(self, w: jax.Array, a: jax.Array, slope: jax.Array, rate: Any):
        """Weights and accumulator after a step along a gradient."""
        a = self.keep * a - rate * slope
        if self.retention.shrink is not None:
            a = self.retention.shrink(a, jnp.asarray(rate, a.dtype))
        return _linked(self.retention, a), a

    def matrix(self, layout: Layout, w, a, g, x, error, rate: Any):
        """Weights and accumulator after the step of the chosen solver."""
        if self.objective.name == "dot":
            if self.solver == "n_gd_steps":
                return self.descend(w, lambda z: g, rate)
            return self.write(w, a, g, rate)
        if x is None or error is None:
            raise ValueError(
                f"objective {self.objective.name!r} needs inputs= and errors= of {layout.name!r}"
            )
        count = x.shape[-2]
        x, u = x.astype(w.dtype), -count * error.astype(w.dtype)

        def slope(z: jax.Array) -> jax.Array:
            return self.objective.error(x @ z.mT, u, None).mT @ x / count

        if self.solver == "one_gd_step":
            return self.write(w, a, slope(w), rate)
        if self.solver == "n_gd_steps":
            return self.descend(w, slope, rate)
        factor = rate * self.objective.factor / count
        right = self.keep * w + factor * u.mT @ x
        new = solve(plus_identity(factor * (x.mT @ x)), right.mT).mT
        return new, new

    def descend(self, w: jax.Array, slope: Any, rate: Any):
        """Many steps on objective + |W - keep W_t|^2 / (2 rate)."""

        def step(_, z: jax.Array) -> jax.Array:
            return z - self.inner_rate * (rate * slope(z) + z - self.keep * w)

        z = jax.lax.fori_loop(0, self.inner_steps, step, w)
        return z, z


def _menus(objective: str | Objective, retain: str | Retention) -> tuple[Objective, Retention]:
    if not isinstance(objective, Objective):
        objective = OBJECTIVES[choice("objective", objective, tuple(OBJECTIVES))]()
    if not isinstance(retain, Retention):
        retain = RETENTIONS[choice("retain", retain, tuple(RETENTIONS))]()
    if objective.token_threshold or objective.penalty is not None:
        raise ValueError(
            f"objective {objective.name!r} needs thresholds or keys that an optimizer has not; use"
            " one with a fixed threshold"
        )
    return objective, retain


def _check_solver(objective: Objective, retain: Retention, solver: str) -> None:
    quadratic = retain.link is None and retain.shrink is None
    if solver == "n_gd_steps" and not quadratic:
        raise ValueError(f"solver='n_gd_steps' knows none and decay, not retain={retain.name!r}")
    exact = objective.name == "dot" or (objective.factor is not None and quadratic)
    if solver == "closed_form" and not exact:
        raise ValueError(
            f"no closed form of objective {objective.name!r} with retain={retain.name!r}: it exists"
            " for dot, and for l2 with none or decay; use one_gd_step"
        )


def _linked(retain: Retention, a: jax.Array) -> jax.Array:
    """`link` of each matrix."""
    if retain.link is None:
        return a
    link = retain.link
    for _ in a.shape[:-2]:
        link = jax.vmap(link)
    return link(a) if a.ndim else link(a[None])[0]


def _accumulators(retain: Retention, params: PyTree, axes: Axes) -> PyTree:
    """A with link(A) = W, for the links that have an inverse.

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

    def one(layout: Layout | None, w: jax.Array) -> tuple[jax.Array]:
        return (inverses[retain.name](w),)

    return on_leaves(one, axes, params)[0]
