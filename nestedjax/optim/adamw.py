"""AdamW with this library's defaults: what steps everything that has no rule of its own."""

import jax
import optax

from nestedjax.optim.matrices import widened
from nestedjax.optim.parts import Mask, lenient, number
from nestedjax.optim.types import LearningRate, Number, PyTree


def adamw(
    learning_rate: LearningRate,
    *,
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    weight_decay: Number = 0.1,
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
      weight_decay: decoupled weight decay, multiplied by the learning rate.
      mask: which parameters decay: a tree of bool, or `mask(params)` that makes it; None: those
        with two axes or more. Weights that are stacked over layers have one axis more than in their
        layer: give a mask for them.

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
    number("b1", b1)
    number("b2", b2)
    decays = _with_two_axes if mask is None else mask
    return widened(
        lenient(optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decays))
    )


def _with_two_axes(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
