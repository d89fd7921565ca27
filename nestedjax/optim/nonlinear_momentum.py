"""Momentum with a nonlinear output: Muon, signed momentum, or any function of the memory."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from nestedjax.optim.matrices import Axes, widened
from nestedjax.optim.parts import (
    Shape,
    choice,
    matrix_function,
    orthogonal,
    scale_by_shape,
    with_adamw,
)
from nestedjax.optim.ranges import checked
from nestedjax.optim.types import (
    Count,
    Decay,
    LearningRate,
    Leaves,
    MatrixFunction,
    NonNegative,
    PyTree,
)

Output: TypeAlias = Literal["quintic", "cubic", "svd", "sign", "none"] | MatrixFunction


@checked
def nonlinear_momentum(
    learning_rate: LearningRate,
    *,
    decay: Decay = 0.95,
    output: Output = "quintic",
    nesterov: bool = True,
    accumulate: Literal["trace", "ema"] = "trace",
    scale: Shape | None = "rms",
    steps: Count = 5,
    weight_decay: NonNegative = 0.1,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum read through a nonlinear function, for matrices; AdamW for everything else.

        m <- decay m + g,    W <- W - lr (scale output(m) + weight_decay W)

    With `output="quintic"` this is Muon, with "sign" signed momentum.

    Args:
      learning_rate: a number or a schedule.
      decay: decay of the momentum, in one step.
      output: function that the momentum is read through: "quintic" or "cubic" Newton-Schulz, "svd"
        (the exact orthogonal factor), "sign", "none", or a function of matrices [..., outputs,
        inputs].
      nesterov: whether `decay m + g` is read in place of m.
      accumulate: whether the momentum is a "trace" as above, or a moving average, "ema":
        m <- decay m + (1 - decay) g.
      scale: factor on a matrix' update: "rms" 0.2 sqrt(max(outputs, inputs)), which gives about the
        root mean square of AdamW's; "jordan" sqrt(max(1, outputs / inputs)); None 1.
      steps: iterations of Newton-Schulz.
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
      >>> tx = optim.nonlinear_momentum(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Nested Learning (arXiv 2512.24695), equation 52; Jordan et al., Muon (2024), for the
      constants; spec B7.

    Departures from the paper:
      1. A learning rate: the printed `W + NS(decay m - lr g)` has no step size, since NS(c m) =
         NS(m) for c > 0.
      2. The learning rate is outside of the memory, as in Muon.
    """
    rule = optax.chain(
        scale_by_nonlinear_momentum(
            decay=decay,
            output=output,
            nesterov=nesterov,
            accumulate=accumulate,
            steps=steps,
            axes=axes,
        ),
        scale_by_shape(scale, axes),
    )
    return with_adamw(rule, learning_rate, axes=axes, weight_decay=weight_decay, rest=rest)


@checked
def scale_by_nonlinear_momentum(
    *,
    decay: Decay = 0.95,
    output: Output = "quintic",
    nesterov: bool = True,
    accumulate: Literal["trace", "ema"] = "trace",
    steps: Count = 5,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`output(m)` of `nonlinear_momentum`, whose arguments these are; state `optax.TraceState`.

    Of leaves that are no matrices it takes the sign for "sign", and else `m / rms(m)`.
    """
    choice("accumulate", accumulate, ("trace", "ema"))
    function = None if output == "sign" else matrix_function(output, steps=steps)

    def read(momenta: Leaves, params: PyTree = None) -> Leaves:
        if output == "sign":
            return jax.tree.map(jnp.sign, momenta)
        return orthogonal(momenta, function, axes)

    memory = optax.trace(decay, nesterov)
    if accumulate == "ema":
        memory = optax.chain(optax.scale(1 - decay), memory)
    return widened(optax.chain(memory, optax.stateless(read)))
