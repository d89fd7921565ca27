"""The chunked delta rule as one TPU kernel each way; see `chunk_loop_tpu`."""

from functools import partial
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chunk_loop_tpu import chunk_loop
from pallas_kernels.chunk_plan import plan
from pallas_kernels.delta_rule.types import DeltaOutput, Operands
from pallas_kernels.delta_rule.xla import (
    chunk_tables,
    delta_chunk_xla,
    read_chunk,
    solve_chunk,
    write_chunk,
)
from pallas_kernels.numerics import Form
from pallas_kernels.products import nn
from pallas_kernels.vmem import vmem_limit_of

_FORM = Form(dense=True)
_GATES = ("rate", "keep", "erase", "momentum")


def delta_rule_pallas_tpu(
    operands: Operands,
    *,
    read: str,
    chunk_size: int,
    vmem_limit: int | None = None,
    every: int | None = None,
    interpret: bool = False,
) -> DeltaOutput:
    """As `delta_rule_xla`, with the memory in VMEM across all chunks.

    Operands with leading axes of size one are repeated in memory first. Tokens beyond the last
    whole chunk run in XLA. A state is stored `every` so many chunks; None: see `chunk_plan`.

    Raises:
      NotImplementedError: numbers of 64 bits.
    """
    start, queries = operands.initial, operands.queries
    if start.dtype != jnp.float32:
        raise NotImplementedError(f"the TPU kernel keeps its state in float32, not {start.dtype}")
    vmem_limit = vmem_limit_of() if vmem_limit is None else vmem_limit
    batch, length = start.shape[:-2], operands.x.shape[-1]
    whole = length // chunk_size * chunk_size
    if read == "anchor":  # the anchor of the whole call, not of each chunk
        operands = operands._replace(queries=None)
    names = ("x", "error", "queries", *_GATES)
    given = {n: getattr(operands, n) for n in names if getattr(operands, n) is not None}
    given = {n: a[..., None, :] if n in _GATES else a for n, a in given.items()}
    given = {n: jnp.broadcast_to(a, (*batch, *a.shape[-2:])) for n, a in given.items()}
    states: dict[str, Any] = {"initial": start}
    if operands.initial_momentum is not None:
        states["initial_momentum"] = operands.initial_momentum
    pieces: list[Any] = []
    if whole:
        flat = {n: a.reshape(-1, *a.shape[-2:]) for n, a in states.items()}
        chunks = {n: _chunks(a[..., :whole], chunk_size) for n, a in given.items()}
        chunk, arguments = partial(_chunk, read), (None, flat, chunks)
        options = plan(
            chunk,
            *arguments,
            name="delta_rule",
            vmem_limit=vmem_limit,
            abreast=4,
            every=every,
            interpret=interpret,
        )
        flat, out = chunk_loop(chunk, options, *arguments)
        states = {n: a.reshape(*batch, *a.shape[-2:]) for n, a in flat.items()}
        if out:
            reads = jnp.moveaxis(out["reads"], 1, 2)
            pieces.append(reads.reshape(*batch, reads.shape[1], whole))
    if whole < length:
        rest = {n: a[..., whole:] for n, a in given.items()}
        rest = {n: a[..., 0, :] if n in _GATES else a for n, a in rest.items()}
        after = delta_chunk_xla(Operands(**rest, **states), read=read)
        states = {"initial": after.final, "initial_momentum": after.final_momentum}
        pieces.append(after.reads)
    found = None
    if queries is not None:
        found = nn(start, queries) if read == "anchor" else jnp.concatenate(pieces, axis=-1)
    return DeltaOutput(found, states["initial"], states.get("initial_momentum"))


def _chunks(array, size):
    """[..., rows, T] -> [S, N, rows, C]."""
    array = array.reshape(-1, array.shape[-2], array.shape[-1] // size, size)
    return jnp.moveaxis(array, 2, 1)


def _chunk(read, _, states, tokens):
    """One chunk of one sequence, inside the kernel: axes [1, rows, C]."""
    tokens = {n: a[:, 0] if n in _GATES else a for n, a in tokens.items()}
    operands = Operands(**tokens, **states)
    tables = chunk_tables(operands.rate, operands.keep, operands.momentum, _FORM)
    solved = solve_chunk(operands, tables, named=False, form=_FORM)
    final, velocity = write_chunk(solved)
    new = {"initial": final}
    if velocity is not None:
        new["initial_momentum"] = velocity
    if operands.queries is None:
        return new, {}
    return new, {"reads": read_chunk(solved, operands.queries, read=read)}
