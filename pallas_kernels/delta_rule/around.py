"""What surrounds the delta rule's kernels: they run the whole chunks, XLA the remaining tokens."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels._linalg.products import nn
from pallas_kernels.delta_rule.types import DeltaOutput, Operands
from pallas_kernels.delta_rule.xla import delta_chunk_xla

GATES = ("learning_rate", "decay", "erase", "momentum")
_TOKENS = ("x", "error", "queries", *GATES)
_STATES = ("initial", "initial_momentum")

# (tokens [S, rows, T], states [S, m, n]), dicts by the names of `Operands` without what is None;
# a gate is one row -> (states after T tokens, reads [S, m, T] or None)
Kernel = Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], Any]]


def around(operands: Operands, kernel: Kernel, *, read: str, chunk_size: int) -> DeltaOutput:
    """Run the whole chunks of a call with a kernel, and the remaining tokens in XLA.

    A kernel has one leading axis, that of sequences, so operands that broadcast are repeated in
    memory first. Reads at "anchor" mean the anchor of the whole call; they are computed here.

    Args:
      operands: see `Operands`; float32.
      kernel: see `Kernel`; T is a multiple of `chunk_size`.
      read: "running_prev", "running" or "anchor".
      chunk_size: tokens of a chunk.
    """
    start, queries = operands.initial, operands.queries
    batch, length = start.shape[:-2], operands.x.shape[-1]
    whole = length // chunk_size * chunk_size
    if read == "anchor":
        operands = operands._replace(queries=None)
    tokens = {n: getattr(operands, n) for n in _TOKENS if getattr(operands, n) is not None}
    tokens = {n: a[..., None, :] if n in GATES else a for n, a in tokens.items()}
    tokens = {n: jnp.broadcast_to(a, (*batch, *a.shape[-2:])) for n, a in tokens.items()}
    states = {n: getattr(operands, n) for n in _STATES if getattr(operands, n) is not None}
    pieces: list[Any] = []
    if whole:
        flat, reads = kernel(
            {n: a[..., :whole].reshape(-1, a.shape[-2], whole) for n, a in tokens.items()},
            {n: a.reshape(-1, *a.shape[-2:]) for n, a in states.items()},
        )
        states = {n: a.reshape(*batch, *a.shape[-2:]) for n, a in flat.items()}
        pieces.append(None if reads is None else reads.reshape(*batch, *reads.shape[-2:]))
    if whole < length:
        rest = {n: a[..., whole:] for n, a in tokens.items()}
        rest = {n: a[..., 0, :] if n in GATES else a for n, a in rest.items()}
        after = delta_chunk_xla(Operands(**rest, **states), read=read)
        states = {"initial": after.final, "initial_momentum": after.final_momentum}
        pieces.append(after.reads)
    found = None
    if queries is not None:
        found = nn(start, queries) if read == "anchor" else jnp.concatenate(pieces, axis=-1)
    return DeltaOutput(found, states["initial"], states.get("initial_momentum"))
