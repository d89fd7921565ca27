"""M3, multi-scale momentum Muon: momenta at several time scales, orthogonalised and summed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

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
    choice,
    matrix_function,
    orthogonal,
    rescaled,
    with_adamw,
)
from nestedjax.optim.ranges import checked
from nestedjax.optim.types import (
    Count,
    Counter,
    Decay,
    Finite,
    LearningRate,
    Leaves,
    NonNegative,
    Number,
    Positive,
)

Accumulate = Literal["ema", "sum"]
SecondMoment = Literal["grad", "ortho", "none"]
BiasCorrection = Literal["auto", "second", "both", "none"]
WarmSlow = Literal["off", "partial"]


class SlowState(NamedTuple):
    """A momentum that is written once in a period.

    Attributes:
      mu: the momentum M2, shaped like the parameters.
      acc_grads: the sum of the gradients since the last write.
      held: O(M2), used until the next write; () where it is recomputed at every step.
    """

    mu: Leaves
    acc_grads: Leaves
    held: Leaves

    def memories(self) -> tuple[Memory, ...]:
        """Its boxes."""
        return accumulator(self.acc_grads), first_moment(self.mu, cache=self.held)


class M3State(NamedTuple):
    """The state of `scale_by_m3`.

    Attributes:
      count: updates done.
      mu: the fast momentum M1.
      nu: the second moment V; () where there is none.
      slow: "every_<period>" -> the momentum that is written once in so many updates.
    """

    count: Counter  # type: ignore[assignment]  # hides tuple.count, as in optax
    mu: Leaves
    nu: Leaves
    slow: dict[str, SlowState]

    def memories(self) -> Iterator[Memory | Part]:
        """Its boxes: two moments, and each slow momentum at a period of its own."""
        yield first_moment(self.mu)
        yield second_moment(self.nu)
        yield from periodic(self.slow)


@checked
def m3(
    learning_rate: LearningRate,
    *,
    b1: Decay = 0.95,
    b2: Decay = 0.98,
    b3: Decay = 0.9,
    period: Count | tuple[Count, ...] = 20,
    slow_weight: Finite | tuple[Finite, ...] = 0.5,
    accumulate: Accumulate = "ema",
    second_moment: SecondMoment = "grad",
    rms_rescale: Positive | None = 0.2,
    bias_correction: BiasCorrection = "auto",
    warm_slow: WarmSlow = "off",
    cache: bool = True,
    orthogonalize: Orthogonalize = "quintic",
    steps: Count = 5,
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.1,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multi-scale momentum Muon for matrices, AdamW for everything else.

    With the gradient g of step t = 1, 2, ..., the orthogonal factor O(M) = U S^0 V^T of M = U S V^T
    (by Newton-Schulz), and the period f:

        M1 <- b1 M1 + (1 - b1) g,    V <- b2 V + (1 - b2) g^2
        W  <- W - lr (u + weight_decay W),   u = (O(M1) + slow_weight O(M2)) / (sqrt(V^) + eps)
        if f divides t:   M2 <- b3 M2 + (1 - b3) mean of the last f gradients

    M2 is a level of its own, f times slower than M1, and acts from step f + 1 on.

    Args:
      learning_rate: a number or a schedule; with `rms_rescale=0.2` one that suits AdamW.
      b1: decay of the fast momentum, in one step.
      b2: decay of the second moment, in one step; 0.999 suits long runs.
      b3: decay of the slow momentum, in one write.
      period: steps between two writes of the slow momentum (100 suits long runs); several numbers
        make several slow momenta.
      slow_weight: weight of the slow momentum in the update, or one weight for each period.
      accumulate: whether the momenta are moving averages, "ema", or as printed weighted sums,
        "sum": M1 <- M1 + b1 g, V <- V + b2 g^2, M2 <- M2 + b3 (sum of f gradients).
      second_moment: what V averages the squares of: "grad", the gradient, as printed; "ortho", the
        orthogonalised sum, as in AdaMuon; "none", no V.
      rms_rescale: root mean square that each matrix' update is rescaled to; None leaves it as it
        comes out.
      bias_correction: which averages are divided by 1 - decay^t: "second", V; "both", V and M1;
        "none"; "auto" is "second" with moving averages and "none" with sums.
      warm_slow: what the slow momentum contributes before its first write: "off", nothing;
        "partial", the sum of the gradients so far.
      cache: whether O(M2) is kept between two writes of M2, at the cost of one more array per
        parameter, or recomputed at every step.
      orthogonalize: what computes O: "quintic" or "cubic" Newton-Schulz, "svd" (exact), "none" (the
        identity), or a function of matrices [..., outputs, inputs].
      steps: iterations of Newton-Schulz.
      eps: added to the denominator sqrt(V).
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      axes: which parameters are matrices, and how: a tree like the parameters, or a function that
        makes it, of `MatrixAxes` or None; None: the last two axes of each are (inputs, outputs).
      rest: the optimizer of the parameters that are no matrices; None:
        `optax.adamw(learning_rate, 0.9, 0.95, weight_decay=0)`.

    Returns:
      A transformation whose state holds 4-5 times the matrices. With
      `optax.inject_hyperparams` name `period`, `steps` and functions in `static_args`.

    Raises:
      ValueError: an argument out of range, or axes that do not fit a parameter, by its name.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.m3(1e-3, period=2)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Nested Learning (arXiv 2512.24695), equation 75 and algorithm 1; spec B11.

    Departures from the paper, each with the argument that undoes it:
      1. Moving averages in place of sums (`accumulate`). O does not depend on the scale of its
         argument, so that with sums b1 and b3 have no effect, and V, which only grows, lowers the
         learning rate like 1/sqrt(t).
      2. Equation 75 subtracts the slow term with b2, algorithm 1 adds it with b3: it is added, with
         b3 (no argument).
      3. A period has f gradients; the printed limits include f + 1 (no argument).
      4. O(M2) is 0 before the first write (`warm_slow`).
      5. V is bias-corrected (`bias_correction`).
      6. The quotient by sqrt(V) has the units of 1/|g| and is no longer orthogonal, so that the
         update is rescaled (`rms_rescale`).
      7. Decoupled weight decay (`weight_decay`); AdamW for what is no matrix (`rest`).
      8. The default values are this library's; the paper publishes none.
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


@checked
def scale_by_m3(
    *,
    b1: Decay = 0.95,
    b2: Decay = 0.98,
    b3: Decay = 0.9,
    period: Count | tuple[Count, ...] = 20,
    slow_weight: Finite | tuple[Finite, ...] = 0.5,
    accumulate: Accumulate = "ema",
    second_moment: SecondMoment = "grad",
    rms_rescale: Positive | None = 0.2,
    bias_correction: BiasCorrection = "auto",
    warm_slow: WarmSlow = "off",
    cache: bool = True,
    orthogonalize: Orthogonalize = "quintic",
    steps: Count = 5,
    eps: NonNegative = 1e-8,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction u of `m3`, whose arguments these are.

    Leaves that are no matrices take `m / rms(m)` in place of the orthogonal factor.
    """
    choice("accumulate", accumulate, get_args(Accumulate))
    choice("second_moment", second_moment, get_args(SecondMoment))
    choice("warm_slow", warm_slow, get_args(WarmSlow))
    choice("bias_correction", bias_correction, get_args(BiasCorrection))
    automatic = "second" if accumulate == "ema" else "none"
    corrected = automatic if bias_correction == "auto" else bias_correction
    function = matrix_function(orthogonalize, steps=steps)
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

    decays: tuple[Number, Number, Number]
    periods: dict[int, Number]  # period -> weight
    ema: bool
    moment: SecondMoment
    corrected: tuple[str, ...]  # which moments are bias-corrected
    partial: bool
    cache: bool
    ortho: Callable[[Leaves], Leaves]
    rescale: Callable[[Leaves], Leaves]
    eps: Number


def _periods(
    period: int | tuple[int, ...], weight: Number | tuple[Number, ...]
) -> dict[int, Number]:
    periods = tuple(period) if isinstance(period, Sequence) else (period,)
    if len({*periods}) < max(len(periods), 1):
        raise ValueError(f"period={period!r} must be one number or several different ones")
    weights = tuple(weight) if isinstance(weight, Sequence) else (weight,) * len(periods)
    if len(weights) != len(periods):
        raise ValueError(f"slow_weight={weight} needs a weight for each period of {periods}")
    return dict(zip(periods, weights, strict=True))


def _init(rule: _Rule, params: Leaves) -> M3State:
    def zeros(wanted: bool = True) -> Leaves:
        return jax.tree.map(jnp.zeros_like, params) if wanted else ()

    slow = {every(f): SlowState(zeros(), zeros(), zeros(rule.cache)) for f in rule.periods}
    return M3State(jnp.zeros((), jnp.int32), zeros(), zeros(rule.moment != "none"), slow)


def _update(rule: _Rule, grads: Leaves, state: M3State) -> tuple[Leaves, M3State]:
    count, (b1, b2, _) = state.count, rule.decays
    mu = _moment(rule, state.mu, grads, b1)
    direction, slow = rule.ortho(_unbiased(rule, "mu", mu, b1, count)), {}
    for f, weight in rule.periods.items():
        before = state.slow[every(f)]
        # The gradient of this step counts for the write at its end, but the slow term of this step
        # is read before that write: M2 acts from step f + 1 on (departure 4).
        total = jax.tree.map(jnp.add, before.acc_grads, grads)
        slower = _slow_direction(rule, before, total, count < f)
        direction = jax.tree.map(lambda o, s, w=weight: o + w * s, direction, slower)
        slow[every(f)] = _slow_write(rule, before, total, f, count)
    nu = state.nu
    if rule.moment != "none":
        # As printed, V divides what is orthogonal already (departure 6). The other order, O of
        # M / sqrt(V), would keep the update orthogonal, and is another algorithm.
        source = grads if rule.moment == "grad" else direction
        nu = _moment(rule, nu, jax.tree.map(jnp.square, source), b2)
        size = _unbiased(rule, "nu", nu, b2, count)
        direction = jax.tree.map(lambda o, v: o / (jnp.sqrt(v) + rule.eps), direction, size)
    return rule.rescale(direction), M3State(count + 1, mu, nu, slow)


def _slow_direction(rule: _Rule, state: SlowState, total: Leaves, first: Bool[Array, ""]) -> Leaves:
    """O(M2), which stays the same between two writes."""
    held = state.held if rule.cache else rule.ortho(state.mu)
    if not rule.partial:
        return held  # 0 before the first write, since O(0) = 0
    return jax.lax.cond(first, lambda: rule.ortho(total), lambda: held)


def _slow_write(
    rule: _Rule, state: SlowState, total: Leaves, period: int, count: Counter
) -> SlowState:
    """The slow momentum after this step; Newton-Schulz runs only where it is written."""

    def write() -> SlowState:
        # The mean, so that M2 is an average of gradients whatever the period; "sum" as printed.
        chunk = jax.tree.map(lambda g: g / period if rule.ema else g, total)
        mu = _moment(rule, state.mu, chunk, rule.decays[2])
        held = rule.ortho(mu) if rule.cache else ()
        return SlowState(mu, jax.tree.map(jnp.zeros_like, total), held)

    return jax.lax.cond(due(count, period), write, lambda: state._replace(acc_grads=total))


def _moment(rule: _Rule, old: Leaves, new: Leaves, decay: Number) -> Leaves:
    """A moving average, or the printed sum, whose terms are weighted by its decay."""
    if rule.ema:
        return jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, old, new)
    return jax.tree.map(lambda m, g: m + decay * g, old, new)


def _unbiased(rule: _Rule, which: str, tree: Leaves, decay: Number, count: Counter) -> Leaves:
    """A moving average divided by the sum of its weights so far, 1 - decay^t."""
    if which not in rule.corrected:
        return tree
    return jax.tree.map(lambda m: m / (1 - decay ** (count + 1).astype(m.dtype)), tree)
