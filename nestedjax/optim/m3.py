"""M3, multi-scale momentum Muon: momenta at several time scales, orthogonalised and summed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestedjax.levels import due
from nestedjax.optim.matrices import Axes, widened
from nestedjax.optim.memories import (
    Memory,
    Part,
    accumulator,
    every,
    first_moment,
    periodic,
    second_moment,
)
from nestedjax.optim.parts import (
    Orthogonalize,
    PyTree,
    Rate,
    choice,
    matrix_function,
    number,
    orthogonal,
    rescaled,
    with_adamw,
)


class SlowState(NamedTuple):
    """A momentum that is written once a period.

    Attributes:
      mu: the momentum, shaped like the parameters.
      acc_grads: sum of the gradients since the last write.
      held: its orthogonal factor, used until the next write; () where it is recomputed.
    """

    mu: PyTree
    acc_grads: PyTree
    held: PyTree

    def memories(self) -> tuple[Memory, ...]:
        """Its boxes."""
        return accumulator(self.acc_grads), first_moment(self.mu, cache=self.held)


class M3State(NamedTuple):
    """The state of `scale_by_m3`.

    Attributes:
      position: updates done.
      mu: the fast momentum.
      nu: the second moment; () where there is none.
      slow: "every_<period>" -> the momentum written once in so many updates.
    """

    position: jax.Array  # shape=(), dtype=int32
    mu: PyTree
    nu: PyTree
    slow: dict[str, SlowState]

    def memories(self) -> Iterator[Memory | Part]:
        """Its boxes: two moments, and each slow momentum at a period of its own."""
        yield first_moment(self.mu)
        yield second_moment(self.nu)
        yield from periodic(self.slow)


def m3(
    learning_rate: Rate,
    *,
    b1: Any = 0.95,
    b2: Any = 0.98,
    b3: Any = 0.9,
    period: int | Sequence[int] = 20,
    slow_weight: Any = 0.5,
    accumulate: str = "ema",
    second_moment: str = "grad",
    rms_rescale: Any = 0.2,
    bias_correction: str | None = None,
    warm_slow: str = "off",
    cache: bool = True,
    orthogonalize: Orthogonalize = "quintic",
    steps: int = 5,
    eps: Any = 1e-8,
    weight_decay: Any = 0.1,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multi-scale momentum Muon for matrices, AdamW for everything else.

    With the gradient g of step t = 1, 2, ..., O = orthogonal factor (Newton-Schulz), period f:

        M1 <- b1 M1 + (1 - b1) g,    V <- b2 V + (1 - b2) g^2
        W  <- W - lr (u + weight_decay W),   u = (O(M1) + slow_weight O(M2)) / (sqrt(V^) + eps)
        if f divides t:   M2 <- b3 M2 + (1 - b3) mean of the last f gradients

    so that M2 is a level of its own, f times slower, and acts from step f + 1 on.

    Args:
      learning_rate: a rate or schedule; with `rms_rescale=0.2` one that suits AdamW.
      b1: decay of the fast momentum.
      b2: decay of the second moment; 0.999 for long runs.
      b3: decay of the slow momentum, a write.
      period: f, updates between two writes of the slow momentum (100 for long runs); several
        numbers make several slow momenta.
      slow_weight: of the slow momentum; one number, or one for each period.
      accumulate: "ema", or "sum" as printed: M1 <- M1 + b1 g, V <- V + b2 g^2, M2 <- M2 + b3 sum.
      second_moment: "grad" (printed), "ortho" (V of the orthogonalised sum, as in AdaMuon), "none".
      rms_rescale: root mean square of each matrix' update; None leaves it as it comes out.
      bias_correction: "second" (V only; the default with "ema"), "both" (M1 too), "none" (the
        default with "sum").
      warm_slow: "off", or "partial": before its first write the slow momentum is its gradient sum.
      cache: hold O(M2) between its writes; False recomputes it, which saves a parameter's memory.
      orthogonalize: "quintic", "cubic", "svd" (exact), "none", or a function of [..., m, n].
      steps: Newton-Schulz iterations.
      eps: in both denominators.
      weight_decay: decoupled, of the matrices.
      axes: which parameters are matrices, and how: a tree or function of `MatrixAxes` or None.
      rest: what steps the others; None: `optax.adamw(learning_rate, 0.9, 0.95, weight_decay=0)`.

    Returns:
      A transformation; its state holds 4-5 times the matrices. With `optax.inject_hyperparams` name
      `period`, `steps` and functions in `static_args`.

    Raises:
      ValueError: an argument out of range, or axes that do not fit a parameter, by its name.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.m3(1e-3, period=2)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Nested Learning (arXiv 2512.24695), equation 75 and algorithm 1.

    Departures from the paper, each with the argument that undoes it:
      1. Moving averages, not sums (`accumulate`): Newton-Schulz has no scale, so that with sums b1
         and b3 do nothing, and V makes the rate fall like 1/sqrt(t).
      2. Eq. 75 subtracts the slow term with b2; algorithm 1 adds it with b3, which is done here.
      3. Its chunks hold f gradients, not f + 1.
      4. O(M2) is 0 before the first write (`warm_slow`).
      5. V is bias-corrected (`bias_correction`).
      6. The quotient has units 1/|g| and is not orthogonal, so it is rescaled (`rms_rescale`).
      7. Decoupled weight decay; AdamW for what is no matrix.
      8. All default values; none is published.
    """
    rule = scale_by_m3(
        b1=b1,
        b2=b2,
        b3=b3,
        period=period,
        slow_weight=slow_weight,
        accumulate=accumulate,
        second_moment=second_moment,
        rms_rescale=rms_rescale,
        bias_correction=bias_correction,
        warm_slow=warm_slow,
        cache=cache,
        orthogonalize=orthogonalize,
        steps=steps,
        eps=eps,
        axes=axes,
    )
    return with_adamw(rule, learning_rate, axes=axes, weight_decay=weight_decay, rest=rest)


def scale_by_m3(
    *,
    b1: Any = 0.95,
    b2: Any = 0.98,
    b3: Any = 0.9,
    period: int | Sequence[int] = 20,
    slow_weight: Any = 0.5,
    accumulate: str = "ema",
    second_moment: str = "grad",
    rms_rescale: Any = 0.2,
    bias_correction: str | None = None,
    warm_slow: str = "off",
    cache: bool = True,
    orthogonalize: Orthogonalize = "quintic",
    steps: int = 5,
    eps: Any = 1e-8,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction u of `m3`, whose arguments these are.

    Leaves that are no matrices take `m / (rms(m) + eps)` in place of the orthogonal factor.
    """
    choice("accumulate", accumulate, ("ema", "sum"))
    choice("second_moment", second_moment, ("grad", "ortho", "none"))
    choice("warm_slow", warm_slow, ("off", "partial"))
    corrected = bias_correction or ("second" if accumulate == "ema" else "none")
    choice("bias_correction", corrected, ("second", "both", "none"))
    for name, value in (("b1", b1), ("b2", b2), ("b3", b3)):
        number(name, value)
    function = matrix_function(orthogonalize, steps=steps, eps=eps)
    rule = _Rule(
        decays=(b1, b2, b3),
        periods=_periods(period, slow_weight),
        ema=accumulate == "ema",
        moment=second_moment,
        corrected={"none": (), "second": ("nu",), "both": ("nu", "mu")}[corrected],
        partial=warm_slow == "partial",
        cache=cache,
        ortho=lambda tree: orthogonal(tree, function, axes),
        rescale=lambda u: u if rms_rescale is None else rescaled(u, rms_rescale, axes),
        eps=eps,
    )
    return widened(
        optax.GradientTransformationExtraArgs(
            lambda params: _init(rule, params),
            lambda updates, state, params=None, **extra: _update(rule, updates, state),
        )
    )


class _Rule(NamedTuple):
    """The settings of one `scale_by_m3`."""

    decays: tuple[Any, Any, Any]
    periods: dict[int, Any]  # period -> weight
    ema: bool
    moment: str
    corrected: tuple[str, ...]
    partial: bool
    cache: bool
    ortho: Callable[[PyTree], PyTree]
    rescale: Callable[[PyTree], PyTree]
    eps: Any


def _periods(period: int | Sequence[int], weight: Any) -> dict[int, Any]:
    periods = tuple(period) if isinstance(period, Sequence) else (period,)
    if not all(isinstance(f, int) and f >= 1 for f in periods) or len({*periods}) < len(periods):
        raise ValueError(
            f"period={period!r} must be one or several different integers >= 1, known when"
            " compiling; with optax.inject_hyperparams name it in static_args"
        )
    weights = tuple(weight) if isinstance(weight, Sequence) else (weight,) * len(periods)
    if len(weights) != len(periods):
        raise ValueError(f"slow_weight={weight} needs a weight for each period of {periods}")
    return dict(zip(periods, weights, strict=True))


def _init(rule: _Rule, params: PyTree) -> M3State:
    def zeros(wanted: bool = True) -> PyTree:
        return jax.tree.map(jnp.zeros_like, params) if wanted else ()

    slow = {every(f): SlowState(zeros(), zeros(), zeros(rule.cache)) for f in rule.periods}
    return M3State(jnp.zeros((), jnp.int32), zeros(), zeros(rule.moment != "none"), slow)


def _update(rule: _Rule, grads: PyTree, state: M3State) -> tuple[PyTree, M3State]:
    position, (b1, b2, _) = state.position, rule.decays
    mu = _moment(rule, state.mu, grads, b1)
    direction, slow = rule.ortho(_unbiased(rule, "mu", mu, b1, position)), {}
    for f, weight in rule.periods.items():
        before = state.slow[every(f)]
        total = jax.tree.map(jnp.add, before.acc_grads, grads)
        slower = _slow_direction(rule, before, total, position < f)
        direction = jax.tree.map(lambda o, s, w=weight: o + w * s, direction, slower)
        slow[every(f)] = _slow_write(rule, before, total, f, position)
    nu = state.nu
    if rule.moment != "none":
        source = grads if rule.moment == "grad" else direction
        nu = _moment(rule, nu, jax.tree.map(jnp.square, source), b2)
        size = _unbiased(rule, "nu", nu, b2, position)
        direction = jax.tree.map(lambda o, v: o / (jnp.sqrt(v) + rule.eps), direction, size)
    return rule.rescale(direction), M3State(position + 1, mu, nu, slow)


def _slow_direction(rule: _Rule, state: SlowState, total: PyTree, first: jax.Array) -> PyTree:
    """What a slow momentum adds: since its last write always the same."""
    held = state.held if rule.cache else rule.ortho(state.mu)
    if not rule.partial:
        return held
    return jax.lax.cond(first, lambda: rule.ortho(total), lambda: held)


def _slow_write(
    rule: _Rule, state: SlowState, total: PyTree, period: int, position: jax.Array
) -> SlowState:
    def write() -> SlowState:
        chunk = jax.tree.map(lambda g: g / period if rule.ema else g, total)
        mu = _moment(rule, state.mu, chunk, rule.decays[2])
        held = rule.ortho(mu) if rule.cache else ()
        return SlowState(mu, jax.tree.map(jnp.zeros_like, total), held)

    return jax.lax.cond(due(position, period), write, lambda: state._replace(acc_grads=total))


def _moment(rule: _Rule, old: PyTree, new: PyTree, decay: Any) -> PyTree:
    """A moving average, or the printed sum weighted by its decay."""
    if rule.ema:
        return jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, old, new)
    return jax.tree.map(lambda m, g: m + decay * g, old, new)


def _unbiased(rule: _Rule, which: str, tree: PyTree, decay: Any, position: jax.Array) -> PyTree:
    """Divided by what a moving average from zero has gathered of its weights, 1 - decay^t."""
    if which not in rule.corrected:
        return tree
    return jax.tree.map(lambda m: m / (1 - decay ** (position + 1).astype(m.dtype)), tree)
