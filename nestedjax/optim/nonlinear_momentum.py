"""Momentum with a nonlinear output: Muon, signed momentum, or any function of the memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nestedjax.optim.matrices import Axes, widened
from nestedjax.optim.parts import (
    PyTree,
    Rate,
    choice,
    matrix_function,
    number,
    orthogonal,
    scale_by_shape,
    with_adamw,
)

Output = str | Callable[[jax.Array], jax.Array]


def nonlinear_momentum(
    learning_rate: Rate,
    *,
    decay: Any = 0.95,
    output: Output = "quintic",
    nesterov: bool = True,
    accumulate: str = "trace",
    scale: str | None = "rms",
    steps: int = 5,
    eps: Any = 1e-8,
    weight_decay: Any = 0.1,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum read through a nonlinear function, for matrices; AdamW for everything else.

        m <- decay m + g,    W <- W - lr (scale output(m) + weight_decay W)

    With `output="quintic"` this is Muon, with "sign" signed momentum.

    Args:
      learning_rate: a rate or schedule; the step size that the printed equation lacks.
      decay: of the momentum.
      output: "quintic" or "cubic" (Newton-Schulz), "svd" (exact), "sign", "none", or a function of
        matrices [..., outputs, inputs].
      nesterov: read `decay m + g` in place of m.
      accumulate: "trace" as above, or "ema": m <- decay m + (1 - decay) g.
      scale: "rms": 0.2 sqrt(max(outputs, inputs)), about AdamW's root mean square;
        "jordan": sqrt(max(1, outputs / inputs)); None: 1.
      steps: Newton-Schulz iterations.
      eps: guards the division by the norm.
      weight_decay: decoupled, of the matrices.
      axes: which parameters are matrices, and how; see `m3`.
      rest: what steps the others; see `m3`.

    Raises:
      ValueError: an argument out of range, or axes that do not fit a parameter, by its name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.nonlinear_momentum(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Nested Learning (arXiv 2512.24695), equation 52; Muon for the constants.

    Departures from the paper: (1) a step size: the printed `W + NS(decay m - lr g)` has none, since
    NS(c m) = NS(m); (2) the rate is outside of the memory.
    """
    rule = optax.chain(
        scale_by_nonlinear_momentum(
            decay=decay,
            output=output,
            nesterov=nesterov,
            accumulate=accumulate,
            steps=steps,
            eps=eps,
            axes=axes,
        ),
        scale_by_shape(scale, axes),
    )
    return with_adamw(rule, learning_rate, axes=axes, weight_decay=weight_decay, rest=rest)


def scale_by_nonlinear_momentum(
    *,
    decay: Any = 0.95,
    output: Output = "quintic",
    nesterov: bool = True,
    accumulate: str = "trace",
    steps: int = 5,
    eps: Any = 1e-8,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`output(m)` of `nonlinear_momentum`, whose arguments these are; state `optax.TraceState`.

    Leaves that are no matrices: sign as it is; for the others `m / (rms(m) + eps)`.
    """
    choice("accumulate", accumulate, ("trace", "ema"))
    number("decay", decay)
    function = None if output == "sign" else matrix_function(output, steps=steps, eps=eps)

    def read(momenta: PyTree, params: PyTree = None) -> PyTree:
        if output == "sign":
            return jax.tree.map(jnp.sign, momenta)
        return orthogonal(momenta, function, axes)

    memory = optax.trace(decay, nesterov)
    if accumulate == "ema":
        memory = optax.chain(optax.scale(1 - decay), memory)
    return widened(optax.chain(memory, optax.stateless(read)))
