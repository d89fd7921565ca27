"""How the learning rate changes in a run."""

from typing import Annotated

import jax
import optax

from nestedjax.optim.ranges import Range, checked
from nestedjax.optim.types import Count, Number


@checked
def warmup_cosine(
    peak: Annotated[float, Range(0)],
    *,
    steps: Count,
    warmup: Annotated[int, Range(0, integer=True)] = 0,
    final_fraction: Annotated[float, Range(0, 1)] = 0.1,
) -> optax.Schedule:
    """A learning rate that rises linearly from 0 to `peak`, then falls along a half cosine.

        peak t / warmup                                              t < warmup
        peak (f + (1 - f) (1 + cos(pi (t - warmup) / (steps - warmup))) / 2)    else

    with f = final_fraction. From step `steps` on it stays at `peak final_fraction`.

    Args:
      peak: the highest learning rate.
      steps: length of the run, in optimizer steps.
      warmup: optimizer steps; more than half of `steps` is cut to that.
      final_fraction: the last learning rate, as a fraction of `peak`.

    Returns:
      `schedule(step) -> learning rate`.

    Raises:
      ValueError: an argument out of range, such as a negative warm-up.

    Example:
      >>> from nestedjax import optim
      >>> schedule = optim.warmup_cosine(1.0, steps=100, warmup=10)
      >>> [round(float(schedule(step)), 2) for step in (0, 5, 10, 100)]
      [0.0, 0.5, 1.0, 0.1]

    Reference:
      Loshchilov and Hutter, SGDR (arXiv 1608.03983), without restarts.
    """
    warmup = min(warmup, steps // 2)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=peak * final_fraction,
    )


@checked
def at_writes(schedule: optax.Schedule, period: Count) -> optax.Schedule:
    """The schedule, by step, of what is written once in `period` steps, by the number of writes.

    Write n = 0, 1, ... happens at the end of a period, in step `(n + 1) period - 1`, counted from
    0, and takes the schedule's value there. With period 1 it is the schedule.

    Args:
      schedule: `step -> value`.
      period: steps between two writes.

    Returns:
      `schedule(writes) -> value`, for an optimizer inside of `accumulate` or `by_period`.

    Raises:
      ValueError: the period is no positive integer.

    Example:
      >>> from nestedjax import optim
      >>> schedule = optim.at_writes(lambda step: 10 * step, 4)
      >>> [schedule(writes) for writes in range(3)]
      [30, 70, 110]
    """

    def at(writes: int | jax.Array) -> Number:
        return schedule(writes * period + (period - 1))

    return at


@checked
def warmup_stable_decay(
    peak: Annotated[float, Range(0)],
    *,
    steps: Count,
    warmup: Annotated[int, Range(0, integer=True)] = 0,
    cooldown: Count | None = None,
    final_fraction: Annotated[float, Range(0, 1)] = 0.1,
) -> optax.Schedule:
    """A learning rate that rises linearly from 0 to `peak`, stays there, and falls linearly.

        peak t / warmup                               t < warmup
        peak                                          t < steps - cooldown
        peak (1 - (1 - f) (t - steps + cooldown) / cooldown)    else

    with f = final_fraction. From step `steps` on it stays at `peak final_fraction`. Before
    `steps - cooldown` it does not depend on `steps`: until then a run may become longer, and is
    the run that was as long from its beginning.

    Args:
      peak: the highest learning rate.
      steps: length of the run, in optimizer steps.
      warmup: optimizer steps; cut to what the cooldown leaves.
      cooldown: optimizer steps, at most `steps`; None for a fifth of `steps`.
      final_fraction: the last learning rate, as a fraction of `peak`.

    Returns:
      `schedule(step) -> learning rate`.

    Raises:
      ValueError: an argument out of range, or a cooldown longer than the run.

    Example:
      >>> from nestedjax import optim
      >>> schedule = optim.warmup_stable_decay(1.0, steps=100, warmup=10, cooldown=20)
      >>> [round(float(schedule(step)), 2) for step in (0, 5, 10, 80, 90, 100)]
      [0.0, 0.5, 1.0, 1.0, 0.55, 0.1]

    Reference:
      Hu et al., MiniCPM (arXiv 2404.06395), with the linear cooldown of Haegele et al.
      (arXiv 2405.18392).
    """
    cooldown = max(steps // 5, 1) if cooldown is None else cooldown
    if cooldown > steps:
        raise ValueError(f"cooldown={cooldown} must be from 1 to steps={steps}; give fewer steps")
    warmup = min(warmup, steps - cooldown)
    parts = [optax.constant_schedule(peak)]
    parts += [optax.linear_schedule(peak, peak * final_fraction, cooldown)]
    ends = [steps - cooldown]
    if warmup:
        parts, ends = [optax.linear_schedule(0.0, peak, warmup), *parts], [warmup, *ends]
    return optax.join_schedules(parts, ends)
