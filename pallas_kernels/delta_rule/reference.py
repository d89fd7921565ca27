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
      Reads [..., m, T] (None without queries) and the final states [..., m, n].
    """
    anchor = operands.initial

    def token(carry, inputs):
        weight, velocity = carry
        x, error, learning_rate, decay, erase, momentum, query = inputs
        step = -learning_rate[..., None, None] * error[..., :, None] * x[..., None, :]
        if momentum is not None:
            step = velocity = momentum[..., None, None] * velocity + step
        old = weight
        kept = weight if decay is None else decay[..., None, None] * weight
        if erase is not None:
            seen = jnp.einsum("...mn,...n->...m", weight, x)
            kept = kept - erase[..., None, None] * seen[..., :, None] * x[..., None, :]
        weight = kept + step
        if query is None:
            return (weight, velocity), None
        source = {"running_prev": old, "running": weight, "anchor": anchor}[read]
        return (weight, velocity), jnp.einsum("...mn,...n->...m", source, query)

    names = ("x", "error", "learning_rate", "decay", "erase", "momentum", "queries")
    arrays = (getattr(operands, name) for name in names)
    inputs = tuple(None if a is None else jnp.moveaxis(a, -1, 0) for a in arrays)
    (weight, velocity), reads = jax.lax.scan(token, (anchor, operands.initial_momentum), inputs)
    reads = None if reads is None else jnp.moveaxis(reads, 0, -1)
    return DeltaOutput(reads, weight, velocity)
