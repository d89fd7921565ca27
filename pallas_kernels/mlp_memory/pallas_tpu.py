"""The deep memory as one TPU kernel each way; see `pallas_kernels._tpu.chunk_loop`."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels._linalg.numerics import Form
from pallas_kernels._tpu.chunk_loop import chunk_loop
from pallas_kernels._tpu.chunk_plan import plan
from pallas_kernels._tpu.vmem import MIB, rounds_products, state_bytes, vmem_limit_of
from pallas_kernels.mlp_memory.context import memory_chunk, restarted
from pallas_kernels.mlp_memory.types import Documents, FastWeights, Readout, Rule, Tokens
from pallas_kernels.mlp_memory.xla import mlp_memory_xla

_ABREAST = 4  # memories of a step: one product of each, for a core has up to four matrix units


def mlp_memory_pallas_tpu(
    start: FastWeights,
    tokens: Tokens,
    readout: Readout | None,
    documents: Documents | None = None,
    *,
    rule: Rule,
    chunk_size: int,
    vmem_limit: int | None = None,
    every: int | None = None,
    sequences: int | None = None,
    rounded: bool | None = None,
    interpret: bool = False,
):
    """As `mlp_memory_xla`, with the fast weights in VMEM across all chunks.

    Tokens are read in the dtype they come in; the reads have that of the keys. Tokens beyond the
    last whole chunk run in XLA. `every` is the number of chunks between two stored states, and a
    step takes `sequences` sequences; None for either: see `chunk_plan`. `rounded` says whether the
    operands of products are rounded to bfloat16; None: see `vmem.rounds_products`.

    Raises:
      NotImplementedError: numbers of 64 bits; memories too large for the VMEM.
    """
    if start.outer.dtype != jnp.float32:
        raise NotImplementedError(
            f"the TPU kernel keeps its state in float32, not {start.outer.dtype}; use "
            "implementation='xla'"
        )
    vmem_limit = vmem_limit_of() if vmem_limit is None else vmem_limit
    # What the compiler asked for on v4, in states and tokens; good to a tenth.
    needed = 37 * state_bytes(start) // 2 + 20_000 * chunk_size
    if needed > vmem_limit:
        raise NotImplementedError(
            f"memories of {state_bytes(start):,} bytes a head with chunks of {chunk_size} take "
            f"about {needed / MIB:.0f} MiB of VMEM, more than {vmem_limit / MIB:.0f}; use "
            "implementation='xla'"
        )
    length = tokens.keys.shape[-1]
    whole = length // chunk_size * chunk_size
    state, pieces = start, []
    if whole:
        form = Form(dense=True, rounded=rounds_products() if rounded is None else rounded)
        options = dict(
            vmem_limit=vmem_limit,
            abreast=max(1, _ABREAST // start.outer.shape[1]),
            every=every,
            sequences=sequences,
            interpret=interpret,
        )
        chunk = partial(_chunk, rule, form)
        parts = jax.tree.map(partial(_chunks, whole=whole, size=chunk_size), tokens)
        state, reads = _loop(chunk, start, parts, readout, documents, options)
        if reads is not None:
            pieces.append(jnp.swapaxes(reads.reshape(len(reads), whole, -1), -1, -2))
    if whole < length:
        rest = jax.tree.map(lambda a: a[..., whole:].astype(start.outer.dtype), tokens)
        if documents is not None:
            documents = documents._replace(begins=documents.begins[:, -1:])
        reads, state = mlp_memory_xla(
            state, rest, readout, documents, rule=rule, chunk_size=chunk_size
        )
        if reads is not None:
            pieces.append(reads.astype(tokens.keys.dtype))
    return jnp.concatenate(pieces, axis=-1) if pieces else None, state


def _loop(chunk, start, parts, readout, documents, options):
    """All whole chunks in the kernels: the state and the reads, [S, N, C, d]."""
    rows = None if readout is None else _as_rows(readout)
    fresh, begins = None, None
    if documents is not None:
        fresh = (documents.inner, documents.outer)
        begins = documents.begins[:, : parts.keys.shape[1], None, None].astype(jnp.float32)
    arguments = ((rows, fresh), start, (parts, begins))
    return chunk_loop(chunk, plan(chunk, *arguments, name="mlp_memory", **options), *arguments)


def _as_rows(readout: Readout) -> Readout:
    """Every array with two trailing axes, which the blocks of a kernel must have."""
    weights = (readout.learning_rate[..., None], readout.decay[..., None])
    return Readout(  # one learning rate for all memories
        *weights, readout.learning_rate_bias[:, None, None], readout.decay_bias[:, None, None]
    )


def _chunks(array, *, whole: int, size: int):
    """Gates [S, T] -> [S, N, 1, C]; features [S, d, T] -> [S, N, C, d], as the caller had them."""
    if array.ndim == 2:
        return array[:, :whole].reshape(len(array), -1, 1, size)
    array = jnp.swapaxes(array, -1, -2)[:, :whole]
    return array.reshape(len(array), -1, size, array.shape[-1])


def _chunk(rule, form, constants, weights, given):
    """One chunk of one sequence, inside the kernel."""
    (rows, fresh), (tokens, begins) = constants, given
    if fresh is not None:
        weights = restarted(weights, begins[0, 0, 0] > 0.5, *fresh)
    dtype = tokens.keys.dtype
    tokens = jax.tree.map(lambda a: a.astype(weights.outer.dtype), tokens)
    columns = [None if a is None else jnp.swapaxes(a, -1, -2) for a in tokens[:3]]
    gates = [None if g is None else g[:, 0] for g in tokens[3:]]
    readout = None
    if rows is not None:
        readout = Readout(*(a[..., 0] for a in rows[:2]), *(a[:, 0, 0] for a in rows[2:4]))
    tokens = tokens._replace(**dict(zip(Tokens._fields, [*columns, *gates], strict=True)))
    weights, reads = memory_chunk(weights, tokens, readout, rule, form=form)
    return weights, None if reads is None else jnp.swapaxes(reads, -1, -2).astype(dtype)
