"""AdamW with this library's defaults: what steps everything that has no rule of its own."""

import optax

from nestedjax.optim.matrices import widened
from nestedjax.optim.parts import Mask, lenient, matrices_in
from nestedjax.optim.ranges import checked
from nestedjax.optim.types import Decay, LearningRate, NonNegative


@checked
def adamw(
    learning_rate: LearningRate,
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.95,
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.1,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay, for parameters of any shape.

        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
        W <- W - lr (m^ / (sqrt(v^) + eps) + weight_decay W)

    with bias-corrected m^ = m / (1 - b1^t) and v^ = v / (1 - b2^t).

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment, in one step.
      b2: decay of the second moment, in one step.
      eps: added to the denominator sqrt(v^).
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      mask: which parameters decay: a tree of bool, or `mask(params)` that makes it; None: those
        with two axes or more. Weights that are stacked over layers have one axis more than in their
        layer: give a mask for them.

    Returns:
      A transformation. With `optax.inject_hyperparams` name functions in `static_args`.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.adamw(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Loshchilov and Hutter, Decoupled weight decay regularization (arXiv 1711.05101).
    """
    decays = matrices_in(None) if mask is None else mask
    return widened(
        lenient(optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decays))
    )
