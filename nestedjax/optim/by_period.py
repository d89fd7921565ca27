"""Optimizers at several frequencies: gradients accumulate and are written when they are due."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from nestedjax.levels import due
from nestedjax.optim.matrices import real
from nestedjax.optim.memories import Memory, Part, accumulator
from nestedjax.optim.ranges import checked
from nestedjax.optim.types import Count, Counter, Leaf, Leaves, PyTree
from pallas_kernels import accumulation_dtype

Periods: TypeAlias = Mapping[str, int | None]
Labels: TypeAlias = PyTree | Callable[[PyTree], PyTree]
Reduction = Literal["mean", "sum"]


class AccumulateState(NamedTuple):
    """The state of `accumulate`.

    Attributes:
      count: update calls since `init`.
      acc_grads: the sum of the gradients since the last write, in at least float32; () where every
        call writes.
      inner: the state of the transformation, which is bitwise constant between two writes.
    """

    count: Counter  # type: ignore[assignment]  # hides tuple.count, as in optax
    acc_grads: Leaves
    inner: PyTree

    def memories(self) -> tuple[Memory | Part, ...]:
        """Its boxes: the gradients that it gathers, and what the transformation remembers."""
        return accumulator(self.acc_grads), Part(self.inner)


@checked
def accumulate(
    tx: optax.GradientTransformation, period: Count | None, *, reduction: Reduction = "mean"
) -> optax.GradientTransformationExtraArgs:
    """Step `tx` once in `period` calls, with the mean or the sum of their gradients.

        call i = 1, 2, ...:       acc <- acc + g_i
        if period divides i:      u_i, inner <- tx(acc / period),   acc <- 0
        else:                     u_i = 0

    The parameters do not move between two writes, so that with equal batches the mean is the
    gradient of one batch that is `period` times as large.

    Args:
      tx: the optimizer. A schedule inside of it counts writes, not calls: give it
        `optim.at_writes(schedule, period)`.
      period: calls between two writes; None or 1 writes at every call.
      reduction: whether `tx` is given the "mean" of the period's gradients, or their "sum", which
        is the paper's.

    Returns:
      A transformation with state `AccumulateState`.

    Raises:
      ValueError: the period is no positive integer, or the reduction is unknown.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nestedjax import optim
      >>> tx = optim.accumulate(optax.sgd(1.0), 2)
      >>> state = tx.init(jnp.zeros(()))
      >>> for gradient in (1.0, 3.0, 5.0):
      ...     update, state = tx.update(jnp.asarray(gradient), state)
      ...     print(update)
      0.0
      -2.0
      0.0

    Reference:
      Nested Learning (arXiv 2512.24695), equation 71; spec D3.

    Departures from the paper: (1) the printed sum has period + 1 terms, this one the period's own;
    (2) the mean (`reduction`), so that a step has the same size whatever the period.
    """
    tx = optax.with_extra_args_support(tx)
    every = 1 if period is None else period
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is not one of mean, sum")
    divisor = every if reduction == "mean" else 1

    def init(params: Leaves) -> AccumulateState:
        real(params)
        nothing = () if every == 1 else jax.tree.map(_wide_zeros, params)
        return AccumulateState(jnp.zeros((), jnp.int32), nothing, tx.init(params))

    def update(updates, state, params=None, **extra):
        if every == 1:
            updates, inner = tx.update(updates, state.inner, params, **extra)
            return updates, AccumulateState(state.count + 1, (), inner)
        total = jax.tree.map(lambda acc, g: acc + g.astype(acc.dtype), state.acc_grads, updates)
        mean = jax.tree.map(lambda acc, g: (acc / divisor).astype(g.dtype), total, updates)

        # A cond, not a select: between two writes the optimizer does not run, and its state is the
        # same to the last bit.
        def write(mean, inner):
            new, inner = tx.update(mean, inner, params, **extra)
            return new, inner, jax.tree.map(jnp.zeros_like, total)

        def wait(mean, inner):
            like = jax.eval_shape(write, mean, inner)[0]
            nothing = jax.tree.map(lambda g, u: jnp.zeros_like(g, dtype=u.dtype), mean, like)
            return nothing, inner, total

        now = due(state.count, every)
        updates, inner, total = jax.lax.cond(now, write, wait, mean, state.inner)
        return updates, AccumulateState(state.count + 1, total, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def by_period(
    groups: Mapping[str, tuple[int | None, optax.GradientTransformation]],
    labels: Labels,
    *,
    reduction: Reduction = "mean",
) -> optax.GradientTransformationExtraArgs:
    """Step each group of parameters at its own period, by one common gradient.

    A continuum memory is trained like this: one loss, one backward pass, and blocks that are
    written at different frequencies. A call is a training step where this is the outer optimizer,
    and a chunk of one sequence inside of `levels.adapt` and `levels.adaptive_level`.

    Args:
      groups: label -> (period in update calls, optimizer); see `accumulate`.
      labels: a tree like the parameters (or a prefix of it) with a label at each leaf, or a
        function that makes it from the parameters.
      reduction: "mean" or "sum" of a period's gradients; see `accumulate`.

    Returns:
      `optax.partition` of one `accumulate` per label. With one label it computes what
      `optax.MultiSteps` does.

    Raises:
      ValueError: what `accumulate` raises, or a label without a group.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nestedjax import optim
      >>> sgd = optax.sgd(1.0)
      >>> tx = optim.by_period({"fast": (1, sgd), "slow": (2, sgd)}, {"a": "fast", "b": "slow"})
      >>> params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
      >>> state = tx.init(params)
      >>> for gradient in (1.0, 3.0):
      ...     updates, state = tx.update({"a": gradient, "b": jnp.asarray(gradient)}, state)
      ...     print(updates["a"], updates["b"])
      -1.0 0.0
      -3.0 -2.0

    Reference:
      Nested Learning (arXiv 2512.24695), equations 70-71; spec D3.
    """
    transforms = {
        label: accumulate(tx, period, reduction=reduction) for label, (period, tx) in groups.items()
    }
    if not callable(labels):
        unknown = sorted({*jax.tree.leaves(labels)} - {*transforms})
        if unknown:
            raise ValueError(f"labels {unknown} have no group; the groups are {list(transforms)}")
    return optax.partition(transforms, labels)


def in_steps(periods: Periods, *, step_tokens: int) -> dict[str, int | None]:
    """Convert periods from tokens of the training stream to optimizer steps.

    Args:
      periods: label -> tokens between two writes; None: a write at every step.
      step_tokens: tokens in one optimizer step, batch x length.

    Returns:
      label -> steps between two writes; None: a write at every step.

    Raises:
      ValueError: a period that is not a multiple of `step_tokens`; the message names the nearest
        ones that are.

    Example:
      >>> from nestedjax import optim
      >>> optim.in_steps({"": None, "cms.0": 4096, "cms.1": 8192}, step_tokens=4096)
      {'': None, 'cms.0': 1, 'cms.1': 2}
    """
    if step_tokens < 1:
        raise ValueError(f"step_tokens={step_tokens} must be at least 1: it is batch x length")
    steps: dict[str, int | None] = {}
    for label, period in periods.items():
        if period is not None and (period < 1 or period % step_tokens):
            below = period // step_tokens * step_tokens
            valid = " or ".join(str(p) for p in (below, below + step_tokens) if p > 0)
            raise ValueError(
                f"the period of {label!r} is {period} tokens, not a multiple of the {step_tokens}"
                f" tokens in one step (batch x length): use {valid}, or another batch or length"
            )
        steps[label] = None if period is None else period // step_tokens
    return steps


def in_tokens(periods: Periods, *, step_tokens: int | Fraction) -> dict[str, int | Fraction]:
    """Convert periods from optimizer steps to tokens, as `levels.describe` takes them.

    Args:
      periods: label -> steps between two writes; None: a write at every step.
      step_tokens: tokens in one optimizer step, batch x length.

    Returns:
      label -> tokens between two writes, with `""` for everything that has no label.

    Example:
      >>> from nestedjax import optim
      >>> optim.in_tokens({"cms.0": None, "cms.1": 2}, step_tokens=4096)
      {'': 4096, 'cms.0': 4096, 'cms.1': 8192}
    """
    return {"": step_tokens} | {label: (n or 1) * step_tokens for label, n in periods.items()}


def _wide_zeros(leaf: Leaf) -> Leaf:
    return jnp.zeros_like(leaf, dtype=accumulation_dtype(leaf))
