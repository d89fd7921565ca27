"""AdaMuon: a second moment of the orthogonalised momentum (baseline of the M3 study)."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestedjax.optim.matrices import Axes, widened
from nestedjax.optim.memories import Memory, first_moment, second_moment
from nestedjax.optim.parts import (
    Orthogonalize,
    choice,
    matrix_function,
    orthogonal,
    rescaled,
    with_adamw,
)
from nestedjax.optim.ranges import checked
from nestedjax.optim.types import Count, Decay, LearningRate, Leaves, NonNegative, Positive


class AdaMuonState(NamedTuple):
    """The state of `scale_by_adamuon`: momentum M and second moment V of its orthogonal factor."""

    mu: Leaves
    nu: Leaves

    def memories(self) -> tuple[Memory, ...]:
        """Its boxes."""
        return first_moment(self.mu), second_moment(self.nu)


@checked
def adamuon(
    learning_rate: LearningRate,
    *,
    b1: Decay = 0.95,
    b2: Decay = 0.95,
    nesterov: bool = False,
    accumulate: Literal["trace", "ema"] = "trace",
    rms_rescale: Positive | None = 0.2,
    orthogonalize: Orthogonalize = "quintic",
    steps: Count = 5,
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.1,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaMuon for matrices, AdamW for everything else.

        M <- b1 M + g,   O = NS(sign(M)),   V <- b2 V + (1 - b2) O^2
        W <- W - lr (rms_rescale U / rms(U) + weight_decay W),   U = O / (sqrt(V) + eps)

    NS is Newton-Schulz, which approximates the orthogonal factor of a matrix.

    Args:
      learning_rate: a number or a schedule; one that suits AdamW.
      b1: decay of the momentum, in one step.
      b2: decay of the second moment, in one step.
      nesterov: whether the sign of `b1 M + g` is taken in place of that of M.
      accumulate: "trace" as above, or "ema", M <- b1 M + (1 - b1) g; sign(M), and so the update, is
        the same.
      rms_rescale: root mean square that each matrix' update is rescaled to; None leaves it as it
        comes out.
      orthogonalize: what computes O: "quintic" or "cubic" Newton-Schulz, "svd" (exact), "none" (the
        identity), or a function of matrices [..., outputs, inputs].
      steps: iterations of Newton-Schulz.
      eps: added to the denominator sqrt(V).
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      axes: which parameters are matrices, and how; see `m3`.
      rest: the optimizer of the parameters that are no matrices; see `m3`.

    Returns:
      A transformation. With `optax.inject_hyperparams` name `steps` and functions in `static_args`.

    Raises:
      ValueError: an argument out of range, or axes that do not fit a parameter, by its name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.adamuon(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Si et al., AdaMuon (arXiv 2507.11005); spec B11.

    Departures:
      1. V has no bias correction, which the rescaling would undo.
      2. No Nesterov momentum, as in the equation above and in the results recorded with it; the
        authors' code has it by default (`nesterov`).
      3. b2 = b1; the authors' code has 0.999 (`b2`).
    """
    rule = scale_by_adamuon(
        b1=b1,
        b2=b2,
        nesterov=nesterov,
        accumulate=accumulate,
        rms_rescale=rms_rescale,
        orthogonalize=orthogonalize,
        steps=steps,
        eps=eps,
        axes=axes,
    )
    return with_adamw(rule, learning_rate, axes=axes, weight_decay=weight_decay, rest=rest)


@checked
def scale_by_adamuon(
    *,
    b1: Decay = 0.95,
    b2: Decay = 0.95,
    nesterov: bool = False,
    accumulate: Literal["trace", "ema"] = "trace",
    rms_rescale: Positive | None = 0.2,
    orthogonalize: Orthogonalize = "quintic",
    steps: Count = 5,
    eps: NonNegative = 1e-8,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of `adamuon`, whose arguments these are.

    Leaves that are no matrices take `s / rms(s)` of s = sign(M) for the orthogonal factor.
    """
    choice("accumulate", accumulate, ("trace", "ema"))
    function = matrix_function(orthogonalize, steps=steps)
    add = 1.0 if accumulate == "trace" else 1 - b1

    def init(params: Leaves) -> AdaMuonState:
        return AdaMuonState(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(updates, state, params=None, **extra):
        mu = jax.tree.map(lambda m, g: b1 * m + add * g, state.mu, updates)
        seen = jax.tree.map(lambda m, g: b1 * m + add * g, mu, updates) if nesterov else mu
        direction = orthogonal(jax.tree.map(jnp.sign, seen), function, axes)
        nu = jax.tree.map(lambda v, o: b2 * v + (1 - b2) * o * o, state.nu, direction)
        direction = jax.tree.map(lambda o, v: o / (jnp.sqrt(v) + eps), direction, nu)
        if rms_rescale is not None:
            direction = rescaled(direction, rms_rescale, axes)
        return direction, AdaMuonState(mu, nu)

    return widened(optax.GradientTransformationExtraArgs(init, update))
