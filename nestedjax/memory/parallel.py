"""Chunk-parallel executions: exact, matrix products and at most one triangular inverse a chunk."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax.memory.state import (
    Memory,
    MemoryState,
    Tokens,
    mean_rates,
    next_window,
    with_window,
)
from pallas_kernels.delta_rule import chunk_tables, delta_chunk


def delta_step(
    memory: Memory, state: MemoryState, tokens: Tokens
) -> tuple[MemoryState, Float[Array, "C dv"]]:
    """One chunk of the delta rule, each weight matrix by a call of its own (spec C6.8).

    All gradients of a chunk are taken at its anchor, so that every matrix sees a known sequence of
    rank-one writes: that is what makes the recurrence parallel. Only the reads depend on each
    other, since matrix m + 1 is read with what matrix m answered. So the architecture's body is
    walked once, with a chunk of the delta rule in place of every product.

    Args:
      memory: its menu entries.
      state: at the chunk's start, the anchor.
      tokens: [C, ...], prepared.

    Returns:
      `(state, reads [C, dv])`.
    """
    anchor = memory.link(state.weights)
    inputs, errors = memory.factors(anchor, tokens)
    decay = jnp.ones_like(tokens.learning_rate) if tokens.decay is None else tokens.decay
    ends: dict[int, Array] = {}
    momenta: dict[int, Array] = {}

    def chunk(m: int, queries: Float[Array, "C n"] | None) -> Any:
        output = delta_chunk(
            inputs[m],
            errors[m],
            memory.write(tokens.learning_rate, inputs[m]),
            decay=tokens.decay,
            erase=memory.erase(m, tokens.learning_rate, decay, inputs[m]),
            momentum=tokens.momentum,
            initial=state.weights[m],
            initial_momentum=None if state.momentum is None else state.momentum[m],
            queries=queries,
            read=memory.read,
        )
        ends[m] = output.final
        if output.final_momentum is not None:
            momenta[m] = output.final_momentum
        return output.reads

    if memory.read == "anchor":
        reads = memory.architecture.apply(anchor, tokens.queries)
        for m in range(len(anchor)):
            chunk(m, None)
    else:
        reads = memory.architecture.forward(chunk, tokens.queries)
    weights = tuple(ends[m] for m in range(len(anchor)))
    momentum = tuple(momenta[m] for m in range(len(anchor))) if momenta else None
    return MemoryState(weights, momentum, None), reads


def omega_coefficients(kept: Float[Array, "C C"], window: int) -> Float[Array, "C W"]:
    """How much of gradient i is in the accumulator after token t.

    `kappa[t, i] = sum_{s <= t, s - window < i <= s} prod_{j = s+1..t} decay_j`: gradient i is added
    by every token s whose window it is in, and each addition has decayed since.

    Args:
      kept: [C, C], the products of decay over the tokens s+1..t, row t, column s; 0 for s > t.
      window: tokens, c.

    Returns:
      [C, c - 1 + C], the columns starting c - 1 tokens before the chunk.
    """
    count = kept.shape[0]
    rows = jnp.arange(count)
    columns = jnp.arange(window - 1 + count)
    inside = (columns[None, :] >= rows[:, None]) & (columns[None, :] < rows[:, None] + window)
    return kept @ inside.astype(kept.dtype)


def omega_step(
    memory: Memory, state: MemoryState, tokens: Tokens
) -> tuple[MemoryState, Float[Array, "C dv"]]:
    """One chunk of a sum of gradients: one score matrix for each weight matrix, and no solve.

    Without erasure the writes do not depend on each other: the weights after token t are the
    decayed anchor plus `sum_i kappa[t, i]` times gradient i, and a read of them is a masked product
    of scores and errors, as in linear attention.

    Args:
      memory: its menu entries.
      state: at the chunk's start, the anchor, and the window before it.
      tokens: [C, ...], prepared.

    Returns:
      `(state, reads [C, dv])`.
    """
    anchor = memory.link(state.weights)
    extended = with_window(state, tokens)
    inputs, errors = memory.factors(anchor, extended)
    count = len(tokens.learning_rate)
    if not count:
        return state, jnp.zeros_like(tokens.values)
    tables = chunk_tables(tokens.learning_rate, tokens.decay, None)
    kept = jnp.ones_like(tokens.learning_rate)
    if memory.rule.mean:
        kappa = tables.decay * mean_rates(jnp.arange(count, dtype=jnp.int32), tokens)[:, None]
    else:
        kept = kept if tables.decay_start is None else tables.decay_start
        kappa = omega_coefficients(tables.decay, memory.rule.window)
    kappa = kappa * extended.learning_rate[None, :]
    final = tuple(
        kept[-1] * a - (kappa[-1][:, None] * e).T @ x
        for a, e, x in zip(state.weights, errors, inputs, strict=True)
    )
    end = MemoryState(final, None, next_window(memory, extended))
    if memory.read == "anchor":
        return end, memory.architecture.apply(anchor, tokens.queries)
    if memory.read == "running_prev":
        # a read before the token's own write: the row of the token before it
        kappa = jnp.concatenate([jnp.zeros_like(kappa[:1]), kappa[:-1]])
        kept = jnp.concatenate([jnp.ones_like(kept[:1]), kept[:-1]])

    def multiply(m: int, z: Float[Array, "C n"]) -> Float[Array, "C m"]:
        return kept[:, None] * (z @ state.weights[m].T) - (kappa * (z @ inputs[m].T)) @ errors[m]

    return end, memory.architecture.forward(multiply, tokens.queries)
