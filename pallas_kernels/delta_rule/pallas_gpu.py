"""The chunked delta rule as one Mosaic GPU kernel each way; see `gpu_forward`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._gpu.tiles import ROWS, SMEM_LIMIT, as_parts, as_tiles
from pallas_kernels.delta_rule.around import GATES, around
from pallas_kernels.delta_rule.gpu_backward import backward
from pallas_kernels.delta_rule.gpu_chunk import GRADIENTS
from pallas_kernels.delta_rule.gpu_forward import Spec, forward, shared_bytes
from pallas_kernels.delta_rule.gpu_vectors import log_sums, logs_of, of_logs, stacked
from pallas_kernels.delta_rule.types import DeltaOutput, Operands

_COLUMNS = (64, 128)  # of a memory: what a warpgroup's registers hold


def delta_rule_pallas_gpu(
    operands: Operands,
    *,
    read: str,
    chunk_size: int,
    dtype: Any,
    every: int | None = None,
    interpret: Any = False,
) -> DeltaOutput:
    """As `delta_rule_xla`, with the memory in registers across all chunks; see `around`.

    Args:
      operands: see `Operands`.
      read: "running_prev", "running" or "anchor".
      chunk_size: 64.
      dtype: of the tokens as they were given: bfloat16 is multiplied as it is, float32 in three
        products of two bfloat16 parts, good to about 2^-16.
      every: chunks between two states that are stored for the backward pass, in the parts of a
        product; None: 2, or 1 where 2 does not divide the chunks or does not fit.
      interpret: parameters of Mosaic GPU's interpreter, for tests on a CPU.

    Raises:
      NotImplementedError: what the kernel does not take, with the reason.
    """
    _check(operands, chunk_size, dtype)

    def kernel(given, states):
        start, whole = states["initial"], given["x"].shape[-1]
        tokens = {n: as_tiles(a, dtype) for n, a in given.items() if n not in GATES}
        gates = {n: a.reshape(-1, whole // ROWS, ROWS) for n, a in given.items() if n in GATES}
        if "decay" in gates:
            gates["decay"] = logs_of(gates["decay"])
        spec = _spec(operands, None if read == "anchor" else read, dtype, whole, every, interpret)
        final, reads = _loop(spec, tokens, gates, start)
        if reads is not None:
            reads = reads.reshape(reads.shape[0], whole, -1).astype(start.dtype)
            reads = jnp.swapaxes(reads, -1, -2)
        return {"initial": final}, reads

    return around(operands, kernel, read=read, chunk_size=ROWS)


def _check(operands: Operands, chunk_size, dtype):
    m, n = operands.initial.shape[-2:]
    if dtype not in (jnp.bfloat16, jnp.float32) or operands.initial.dtype != jnp.float32:
        raise NotImplementedError(
            f"the GPU kernel takes bfloat16 or float32, not {jnp.dtype(dtype).name} with a "
            f"{operands.initial.dtype} state: use implementation='xla'"
        )
    if operands.momentum is not None:
        raise NotImplementedError("the GPU kernel has no momentum: use implementation='xla'")
    if chunk_size != ROWS:
        raise NotImplementedError(
            f"the GPU kernel solves chunks of {ROWS} tokens, a warpgroup's tile, not {chunk_size}"
        )
    if m % ROWS or n not in _COLUMNS:
        raise NotImplementedError(
            f"the GPU kernel takes memories of 64 k x 64 or 64 k x 128, not {m} x {n}: "
            "pad the features or use implementation='xla'"
        )


def _spec(operands: Operands, read, dtype, whole, every, interpret) -> Spec:
    """What the kernels are compiled for; refuses what does not fit a block's shared memory."""
    n, chunks = operands.initial.shape[-1], whole // ROWS
    if every is not None and chunks % every:
        raise ValueError(f"every={every} must divide the {chunks} chunks of 64 tokens")
    reads = None if operands.queries is None else read
    parts = 1 if dtype == jnp.bfloat16 else 2
    fields = (parts, operands.decay is not None, operands.erase is not None, reads)
    for k in (every,) if every else (2, 1):
        spec = Spec(*fields, k, interpret)
        needed = shared_bytes(spec, n, slots=1, backward=True)
        if chunks % k == 0 and needed <= SMEM_LIMIT:
            return spec
    raise NotImplementedError(
        f"the GPU kernel's backward pass needs {needed} bytes of shared memory for a {dtype} "
        f"memory of {n} columns, a block has {SMEM_LIMIT}: use bfloat16 or implementation='xla'"
    )


def _vectors(gates):
    """Learning rate, erase and the logs of decay [S, N, 64] as `VECTORS` [S, N, 6, 64]."""
    sums = log_sums(gates["decay"]) if "decay" in gates else {}
    return stacked({n: gates[n] for n in ("learning_rate", "erase") if n in gates} | sums)


def _tokens(spec, tokens, gates):
    return {n: as_parts(a, spec.parts) for n, a in tokens.items()} | {"vectors": _vectors(gates)}


def _slots(spec, n):
    """Two, so that copies run ahead, only where an SM still holds two blocks."""
    return 2 if 2 * shared_bytes(spec, n, slots=2, backward=False) <= SMEM_LIMIT else 1


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(spec: Spec, tokens: dict, gates: dict, start: Any):
    """The final memory and the reads; `gates["decay"]` are logarithms."""
    return _loop_fwd(spec, tokens, gates, start, keep_states=False)[0]


def _loop_fwd(spec, tokens, gates, start, keep_states=True):
    found = forward(
        spec,
        _tokens(spec, tokens, gates),
        start,
        slots=_slots(spec, start.shape[-1]),
        keep_states=keep_states,
    )
    return (found["final"], found.get("reads")), (tokens, gates, found.get("starts"))


def _loop_bwd(spec, kept, cotangents):
    tokens, gates, starts = kept
    of_final, of_reads = cotangents
    given = _tokens(spec, tokens, gates)
    if spec.read:
        given["of_reads"] = as_parts(of_reads, spec.parts)
    found = backward(spec, given, starts, of_final)
    of_tokens = {"error": found["error"]}
    for name in ("x", "queries"):
        if name in tokens:  # summed over the blocks of a memory's rows
            total = jnp.sum(found[name], axis=0, dtype=jnp.float32)
            of_tokens[name] = total.astype(tokens[name].dtype)
    vectors = jnp.sum(found["vectors"], axis=0)
    of = {name: vectors[..., GRADIENTS.index(name), :] for name in GRADIENTS}
    of_gates = {name: of[name] for name in ("learning_rate", "erase") if name in gates}
    if spec.decay:
        of_gates["decay"] = of_logs(of, erase=spec.erase, read=spec.read)
    return of_tokens, of_gates, found["start"]


_loop.defvjp(_loop_fwd, _loop_bwd)
