"""The chunked delta rule as one TPU kernel each way; see `pallas_kernels._tpu.chunk_loop`."""

from functools import partial

import jax.numpy as jnp

from pallas_kernels._linalg.numerics import Form
from pallas_kernels._tpu.chunk_loop import chunk_loop
from pallas_kernels._tpu.chunk_plan import plan
from pallas_kernels._tpu.vmem import vmem_limit_of
from pallas_kernels.delta_rule.around import GATES, around
from pallas_kernels.delta_rule.types import DeltaOutput, Operands
from pallas_kernels.delta_rule.xla import chunk_tables, read_chunk, solve_chunk, write_chunk

_FORM = Form(dense=True)


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

    `every` is the number of chunks between two stored states; None: see `chunk_plan`. For the
    other arguments see `around`.

    Raises:
      NotImplementedError: numbers of 64 bits.
    """
    dtype = operands.initial.dtype
    if dtype != jnp.float32:
        raise NotImplementedError(f"the TPU kernel keeps its state in float32, not {dtype}")
    vmem_limit = vmem_limit_of() if vmem_limit is None else vmem_limit

    def kernel(tokens, states):
        chunk = partial(_chunk, read)
        arguments = None, states, {n: _chunks(a, chunk_size) for n, a in tokens.items()}
        options = plan(
            chunk,
            *arguments,
            name="delta_rule",
            vmem_limit=vmem_limit,
            abreast=4,
            every=every,
            interpret=interpret,
        )
        states, out = chunk_loop(chunk, options, *arguments)
        if not out:
            return states, None
        reads = jnp.moveaxis(out["reads"], 1, 2)
        return states, reads.reshape(*reads.shape[:2], -1)

    return around(operands, kernel, read=read, chunk_size=chunk_size)


def _chunks(array, size):
    """[S, rows, T] -> [S, N, rows, C]."""
    array = array.reshape(*array.shape[:2], -1, size)
    return jnp.moveaxis(array, 2, 1)


def _chunk(read, _, states, tokens):
    """One chunk of one sequence, inside the kernel: axes [1, rows, C]."""
    tokens = {n: a[:, 0] if n in GATES else a for n, a in tokens.items()}
    operands = Operands(**tokens, **states)
    tables = chunk_tables(operands.learning_rate, operands.decay, operands.momentum, _FORM)
    solved = solve_chunk(operands, tables, named=False, form=_FORM)
    final, velocity = write_chunk(solved)
    new = {"initial": final}
    if velocity is not None:
        new["initial_momentum"] = velocity
    if operands.queries is None:
        return new, {}
    return new, {"reads": read_chunk(solved, operands.queries, read=read)}
