"""The usual outer optimizer: AdamW with warm-up, cosine decay and a clipped global norm."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from nestedjax.training.state import PyTree


def warmup_cosine(
    peak: float, *, steps: int, warmup: int = 0, final_fraction: float = 0.1
) -> optax.Schedule:
    """Learning rate: linear from 0 to `peak` in `warmup` steps, then a cosine down to the end.

    Args:
      peak: the highest learning rate.
      steps: of the run; the rate is `peak * final_fraction` from there on.
      warmup: steps; cut to half of `steps` in a short run.
      final_fraction: of `peak`.

    Raises:
      ValueError: a step count that is not positive or a negative warm-up.

    Example:
      >>> [round(float(warmup_cosine(1.0, steps=100, warmup=10)(s)), 2) for s in (0, 5, 10, 100)]
      [0.0, 0.5, 1.0, 0.1]
    """
    if steps < 1 or warmup < 0:
        raise ValueError(f"steps={steps} must be positive and warmup={warmup} not negative")
    warmup = min(warmup, steps // 2)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=peak * final_fraction,
    )


def matrices(params: PyTree) -> PyTree:
    """Whether each parameter is a matrix (two axes or more), for masking weight decay.

    Parameters stacked over layers have one axis more than in their layer; mask those by their
    logical axes instead.
    """
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.1,
    decay_mask: Callable[[PyTree], Any] = matrices,
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
) -> optax.GradientTransformation:
    """AdamW behind a clipped global gradient norm.

    Args:
      learning_rate: a rate, or a schedule such as `warmup_cosine`.
      weight_decay: decoupled, times the learning rate.
      decay_mask: `decay_mask(params) -> tree of bool`, which parameters decay.
      clip: the largest global norm of a gradient; None does not clip.
      b1: decay of the first moment.
      b2: decay of the second moment.
    """
    inner = optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay, mask=decay_mask)
    return inner if clip is None else optax.chain(optax.clip_by_global_norm(clip), inner)
