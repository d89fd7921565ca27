"""Delta gradient descent: weights forget along the inputs they are trained on (spec B9)."""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nestedjax.optim.matrices import (
    Axes,
    Layout,
    fold,
    layouts,
    named,
    plus_identity,
    unfold,
    widened,
)
from nestedjax.optim.parts import choice, lenient
from nestedjax.optim.ranges import checked
from nestedjax.optim.taps import TAP, names_of
from nestedjax.optim.types import Counter, Fraction, LearningRate, Leaves, Matrices, Number, PyTree
from pallas_kernels import solve

WEIGHTS = ("kernel", "embedding")
Form = Literal["implicit", "explicit", "neurips"]
BatchForm = Literal["explicit", "exact", "mean_of_rank1"]
Coupling = Literal["decoupled", "coupled"]


class DGDState(NamedTuple):
    """The state of `scale_by_dgd`: updates done, for a learning rate that is a schedule."""

    count: Counter  # type: ignore[assignment]  # hides tuple.count, as in optax

    def memories(self) -> tuple[()]:
        """None: the weights themselves are the memory."""
        return ()


@checked
def dgd(
    learning_rate: LearningRate,
    *,
    form: Form = "implicit",
    batch: BatchForm = "explicit",
    coupling: Coupling = "decoupled",
    decay: Fraction = 1.0,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Delta gradient descent for layers with a tap, AdamW for everything else.

    One step of `argmin 1/2 mean |W x - u|^2 + |W - W_t|^2 / (2 lr)` with u = -dL/dy, the target
    that the layer makes itself. With C = X^T X / n and the mean gradient g:

        W <- W (decay I - r C) - r g        r = lr / (1 + lr trace(C))

    For one input this is the exact minimiser, r = lr / (1 + lr |x|^2).

    Args:
      learning_rate: lr, a number or a schedule.
      form: step size r and the coefficient of C: "implicit", r as above in both places; "explicit",
        r = lr in both, which needs lr |C| < 2; "neurips", C itself and r = lr, as printed there:
        `W (decay I - C) - lr g`.
      batch: how a batch is solved for: "explicit" as above; "exact", the minimiser over the batch,
        `(W - lr g) (I + lr C)^-1`, with one solve for each layer; "mean_of_rank1", the mean over
        the inputs of their own exact steps, for layers tapped with `rank1_learning_rate=lr`.
      coupling: where the decay stands: "decoupled" as above, or "coupled", `decay W (I - r C) - r
        g`, the minimiser that is pulled to decay W_t.
      decay: factor on the weights in one step, 1 for none: this rule's own weight decay.
      axes: how the kernels are matrices; see `m3`. None: [inputs, outputs], stacks in front.
      rest: the optimizer of the parameters without a tap; None:
        `optax.adamw(learning_rate, 0.9, 0.95, weight_decay=0)`.

    Returns:
      A transformation that needs `params`, and parameters in which each layer's tap (see
      `tapped_linear`) is called "tap" and lies beside its "kernel" or "embedding". With
      `optax.inject_hyperparams` name functions in `static_args`.

    Raises:
      ValueError: an argument out of range; parameters without any tap, or a tap that does not fit
        its weight, by name.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((2, 1)), "tap": jnp.zeros((2, 2))}
      >>> x = jnp.array([[1.0, 0.0]])
      >>> loss = lambda p: optim.tapped_linear(x, p["kernel"], p["tap"]).mean()
      >>> tx = optim.dgd(1.0)
      >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
      >>> updates["kernel"].tolist(), updates["tap"].any().item()
      ([[-1.0], [0.0]], False)

    Reference:
      Nested Learning (arXiv 2512.24695), equations 56-57 and appendix C; spec B9.

    Departures from the paper:
      1. From (114) on appendix C has lr in the place of 1/lr, and the target's sign flipped; the
         coefficient here is that of the stated problem, lr / (1 + lr |x|^2).
      2. Mini-batches (`batch`), which the paper does not treat.

    The minimised loss is not the task's: with `1/2 |W x - v|^2` and one repeated sample DGD
    converges to W x = v / 2. Do not use it as an outer optimizer without wanting that.
    """
    rule = scale_by_dgd(
        learning_rate, form=form, batch=batch, coupling=coupling, decay=decay, axes=axes
    )
    others = optax.adamw(learning_rate, 0.9, 0.95, weight_decay=0.0) if rest is None else rest
    return widened(optax.partition({"delta": rule, "rest": lenient(others)}, tapped))


@checked
def scale_by_dgd(
    learning_rate: LearningRate,
    *,
    form: Form = "implicit",
    batch: BatchForm = "explicit",
    coupling: Coupling = "decoupled",
    decay: Fraction = 1.0,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """The whole update of `dgd`, whose arguments these are, for parameters that all have taps.

    The learning rate is inside: it decides how much is erased, and is no factor of the update.
    """
    choice("form", form, get_args(Form))
    choice("batch", batch, get_args(BatchForm))
    choice("coupling", coupling, get_args(Coupling))

    step = partial(_step, form=form, batch=batch, coupled=coupling == "coupled", decay=decay)

    def init(params: Leaves) -> DGDState:
        return DGDState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("dgd needs the parameters: tx.update(grads, state, params)")
        now = learning_rate(state.count) if callable(learning_rate) else learning_rate
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        weights, layout = jax.tree.leaves(params), layouts(axes, updates)
        taps = _pairs([path for path, _ in leaves])
        new = [jnp.zeros_like(leaf) for _, leaf in leaves]
        for tap, weight in taps.items():
            path, gram = leaves[tap]
            how = _fits(gram, layout[weight], named(path))
            w, g = fold(weights[weight], how), fold(leaves[weight][1], how)
            new[weight] = unfold(step(w, g, gram, now) - w, how)
        return jax.tree.unflatten(jax.tree.structure(updates), new), DGDState(state.count + 1)

    return widened(optax.GradientTransformationExtraArgs(init, update))


def tapped(params: PyTree) -> PyTree:
    """ "delta" for each tap and the weight beside it, "rest" for every other parameter.

    Raises:
      ValueError: there is no tap, or one without a weight.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    pairs = _pairs(paths)
    if paths and not pairs:
        raise ValueError(
            "dgd found no parameter called 'tap': use layers with taps (optim.tapped_linear), or"
            " models.add_taps(model)"
        )
    found = {*pairs, *pairs.values()}
    kinds = ["delta" if i in found else "rest" for i in range(len(paths))]
    return jax.tree.unflatten(jax.tree.structure(params), kinds)


def _pairs(paths: list[tuple[Any, ...]]) -> dict[int, int]:
    """Index of each tap among the leaves -> index of its weight."""
    names = [names_of(path) for path in paths]
    index = {tuple(name): i for i, name in enumerate(names)}
    pairs = {}
    for i, name in enumerate(names):
        if TAP in name:
            beside = [tuple(w if n == TAP else n for n in name) for w in WEIGHTS]
            known = [index[path] for path in beside if path in index]
            if len(known) != 1:
                raise ValueError(f"{'.'.join(name)!r} needs one of {WEIGHTS} beside it")
            pairs[i] = known[0]
    return pairs


def _step(
    w: Matrices,
    g: Matrices,
    c: Float[Array, "*stack inputs inputs"] | Float[Array, "*stack inputs"],
    learning_rate: Number,
    *,
    form: Form,
    batch: BatchForm,
    coupled: bool,
    decay: Number,
) -> Matrices:
    """Weights after one step; c has one axis less where C is diagonal (an embedding's)."""
    diagonal = c.ndim < w.ndim

    def seen(w: Matrices) -> Matrices:
        return w * c[..., None, :] if diagonal else w @ c

    decayed = decay * w if coupled else w
    if batch == "exact":
        right = decayed - learning_rate * g
        if diagonal:
            solved = right / (1 + learning_rate * c[..., None, :])
        else:
            # (I + lr C) is symmetric: solving with it from the left on transposes is the solve
            # from the right.
            solved = solve(plus_identity(learning_rate * c), right.mT).mT
        return solved if coupled else solved - (1 - decay) * w
    erase = write = learning_rate
    if batch == "explicit" and form == "implicit":
        # lr |C| may be anything, but |C| <= trace(C), so that r |C| < 1 and the step contracts for
        # inputs of any norm. For one input trace(C) = |x|^2, and the step is exact (equation 57).
        trace = jnp.sum(c, axis=-1) if diagonal else jnp.trace(c, axis1=-2, axis2=-1)
        erase = write = learning_rate / (1 + learning_rate * trace[..., None, None])
    elif form == "neurips":
        erase = 1.0
    return (decayed if coupled else decay * w) - erase * seen(decayed) - write * g


def _fits(gram: Float[Array, "..."], layout: Layout | None, name: str) -> Layout:
    """The layout of the weight beside a tap.

    Raises:
      ValueError: there is none, or the tap has another shape than its C.
    """
    if layout is None:
        raise ValueError(f"the weight beside {name!r} is labelled None in axes: give its axes")
    stack, n = layout.matrix[:-2], layout.matrix[-1]
    if gram.shape not in ((*stack, n), (*stack, n, n)):  # an embedding's C is diagonal
        raise ValueError(f"{name!r} has shape {gram.shape}; its weight needs {(*stack, n, n)}")
    return layout
