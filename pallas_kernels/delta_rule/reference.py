"""The delta-rule recurrence token by token: slow, obvious, and the oracle of every other form."""

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule.types import DeltaOutput, Operands


def delta_rule_reference(operands: Operands, *, read: str) -> DeltaOutput:
    """Run the recurrence one token at a time with `jax.lax.scan` (spec C6.5).

    Args:
      operands: validated operands, already in the accumulation dtype.
      read: "running_prev" (W_{t-1} q_t), "running" (W_t q_t) or "anchor" (W_0 q_t).

    Returns:
      Reads [..., T, m] (None without queries) and the final states [..., m, n].
    """
    anchor = operands.initial

    def token(carry, inputs):
        weight, velocity = carry
        x, error, rate, keep, erase, momentum, query = inputs
        step = -rate[..., None, None] * error[..., :, None] * x[..., None, :]
        if momentum is not None:
            step = velocity = momentum[..., None, None] * velocity + step
        old = weight
        kept = weight if keep is None else keep[..., None, None] * weight
        if erase is not None:
            seen = jnp.einsum("...mn,...n->...m", weight, x)
            kept = kept - erase[..., None, None] * seen[..., :, None] * x[..., None, :]
        weight = kept + step
        if query is None:
            return (weight, velocity), None
        source = {"running_prev": old, "running": weight, "anchor": anchor}[read]
        return (weight, velocity), jnp.einsum("...mn,...n->...m", source, query)

    def time_first(array, trailing):
        return None if array is None else jnp.moveaxis(array, -1 - trailing, 0)

    inputs = (
        time_first(operands.x, 1),
        time_first(operands.error, 1),
        time_first(operands.rate, 0),
        time_first(operands.keep, 0),
        time_first(operands.erase, 0),
        time_first(operands.momentum, 0),
        time_first(operands.queries, 1),
    )
    (weight, velocity), reads = jax.lax.scan(token, (anchor, operands.initial_momentum), inputs)
    reads = None if reads is None else jnp.moveaxis(reads, 0, -2)
    return DeltaOutput(reads, weight, velocity)
