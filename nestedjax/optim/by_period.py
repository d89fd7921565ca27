"""Optimizers at several frequencies: gradients accumulate and are written when they are due."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestedjax.levels import due
from nestedjax.optim.memories import Memory, Part, accumulator
from pallas_kernels import accumulation_dtype

PyTree = Any
Periods = Mapping[str, int | None]


class AccumulateState(NamedTuple):
    """The state of `accumulate`.

    Attributes:
      position: update calls since `init`.
      acc_grads: the sum of the gradients since the last write, in at least float32; () where every
        call writes.
      inner: the state of the transformation, bitwise constant between two writes.
    """

    position: jax.Array  # shape=(), dtype=int32
    acc_grads: PyTree
    inner: PyTree

    def memories(self) -> tuple[Memory | Part, ...]:
        """Its boxes: the gradients that it gathers, and what the transformation remembers."""
        return accumulator(self.acc_grads), Part(self.inner)


def accumulate(
    tx: optax.GradientTransformation, period: int | None, *, reduction: str = "mean"
) -> optax.GradientTransformationExtraArgs:
    """Step `tx` once every `period` calls, with the mean or the sum of their gradients.

    At call i = 1, 2, ...: `acc <- acc + g_i`; if period divides i, `u_i, inner <- tx(acc / period)`
    and `acc <- 0`, else `u_i = 0`. The parameters do not move in between, so with equal batches the
    mean is the gradient of one batch `period` times as large.

    Args:
      tx: the optimizer. A schedule inside it counts writes, not calls.
      period: calls between two writes; None or 1 writes at every call.
      reduction: "mean" or "sum" (the paper's) of the gradients.

    Returns:
      A transformation with state `AccumulateState`.

    Raises:
      ValueError: if the period is not a positive integer or the reduction unknown.

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
      Nested Learning (arXiv 2512.24695), equation 71. Where it prints a sum over period + 1 tokens,
      this one is over the period's own.
    """
    tx = optax.with_extra_args_support(tx)
    every = 1 if period is None else period
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"period={period!r} must be None or an integer >= 1")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is not one of mean, sum")
    divisor = every if reduction == "mean" else 1

    def init(params: PyTree) -> AccumulateState:
        nothing = () if every == 1 else jax.tree.map(_wide_zeros, params)
        return AccumulateState(jnp.zeros((), jnp.int32), nothing, tx.init(params))

    def update(updates, state, params=None, **extra):
        if every == 1:
            updates, inner = tx.update(updates, state.inner, params, **extra)
            return updates, AccumulateState(state.position + 1, (), inner)
        total = jax.tree.map(lambda acc, g: acc + g.astype(acc.dtype), state.acc_grads, updates)
        mean = jax.tree.map(lambda acc, g: (acc / divisor).astype(g.dtype), total, updates)

        def write(mean, inner):
            new, inner = tx.update(mean, inner, params, **extra)
            return new, inner, jax.tree.map(jnp.zeros_like, total)

        def wait(mean, inner):
            like = jax.eval_shape(write, mean, inner)[0]
            nothing = jax.tree.map(lambda g, u: jnp.zeros_like(g, dtype=u.dtype), mean, like)
            return nothing, inner, total

        now = due(state.position, every)
        updates, inner, total = jax.lax.cond(now, write, wait, mean, state.inner)
        return updates, AccumulateState(state.position + 1, total, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def by_period(
    groups: Mapping[str, tuple[int | None, optax.GradientTransformation]],
    labels: PyTree | Callable[[PyTree], PyTree],
    *,
    reduction: str = "mean",
) -> optax.GradientTransformationExtraArgs:
    """Step each group of parameters at its own period, by one common gradient.

    This is what trains a continuum memory: one loss, one backward pass, and blocks that are written
    at different frequencies. As outer optimizer a call is a training step; inside
    `levels.adapt` and `levels.adaptive_level` it is a chunk of one sequence.

    Args:
      groups: label -> (period in update calls, optimizer); see `accumulate`.
      labels: a tree like the parameters (or a prefix of it) with a label at each leaf, or a
        function that makes it from the parameters.
      reduction: "mean" or "sum" of a period's gradients.

    Returns:
      `optax.partition` of one `accumulate` per label; with one label it is `optax.MultiSteps`.

    Raises:
      ValueError: for what `accumulate` raises, and for a label without a group.

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
      Nested Learning (arXiv 2512.24695), equations 70-71.
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
    """Periods in optimizer steps from periods in tokens of the training stream.

    Args:
      periods: label -> tokens between two writes; None for every step.
      step_tokens: tokens in one optimizer step, batch x length.

    Returns:
      label -> steps between two writes, None for every step.

    Raises:
      ValueError: if a period is not a multiple of `step_tokens`; names the nearest ones that are.

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
    """Periods in tokens from periods in optimizer steps, as `levels.describe` takes them.

    Args:
      periods: label -> steps between two writes; None for every step.
      step_tokens: tokens in one optimizer step, batch x length.

    Returns:
      label -> tokens, with `""` for everything that has no label.

    Example:
      >>> from nestedjax import optim
      >>> optim.in_tokens({"cms.0": None, "cms.1": 2}, step_tokens=4096)
      {'': 4096, 'cms.0': 4096, 'cms.1': 8192}
    """
    return {"": step_tokens} | {label: (n or 1) * step_tokens for label, n in periods.items()}


def _wide_zeros(leaf):
    return jnp.zeros_like(leaf, dtype=accumulation_dtype(leaf))
