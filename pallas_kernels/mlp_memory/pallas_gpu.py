"""The deep memory as one Mosaic GPU kernel each way; see `gpu_forward`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._gpu.tiles import ROWS, SMEM_LIMIT, as_parts, as_tiles, summed
from pallas_kernels.delta_rule.gpu_vectors import (
    log_sums,
    logs_of,
    momentum_sums,
    of_logs,
    of_momentum_logs,
    stacked,
)
from pallas_kernels.mlp_memory.gpu_backward import backward
from pallas_kernels.mlp_memory.gpu_cell import erase_of, erases_of
from pallas_kernels.mlp_memory.gpu_forward import Spec, forward, shared_bytes
from pallas_kernels.mlp_memory.gpu_self_modifying import self_modifying
from pallas_kernels.mlp_memory.types import Documents, FastWeights, Readout, Rule, Tokens
from pallas_kernels.mlp_memory.xla import mlp_memory_xla


def mlp_memory_pallas_gpu(
    start: FastWeights,
    tokens: Tokens,
    readout: Readout | None,
    documents: Documents | None = None,
    *,
    rule: Rule,
    chunk_size: int,
    interpret: Any = False,
) -> tuple[Float[Array, "H d T"] | None, FastWeights]:
    """As `mlp_memory_xla`, with the fast weights in registers across all chunks.

    Tokens are read in the dtype they come in: bfloat16 is multiplied as it is, float32 in three
    products of two bfloat16 parts, good to about 2^-16. Memories that learn a given context are
    each a block of threads of their own, memories that make their context one block together (see
    `gpu_self`). Tokens beyond the last whole chunk run in XLA. The forward pass stores the start of
    each chunk for the backward one, in the parts of a product.

    Args:
      start: see `FastWeights`.
      tokens: see `Tokens`.
      readout: see `Readout`, or None.
      documents: see `Documents`, or None.
      rule: see `Rule`.
      chunk_size: 64.
      interpret: parameters of Mosaic GPU's interpreter, for tests on a CPU.

    Raises:
      NotImplementedError: what the kernel does not take, with the reason.
    """
    parts = _check(start, tokens, rule, chunk_size)
    length = tokens.keys.shape[-1]
    whole = length // ROWS * ROWS
    last, reads = start, None
    if whole:
        spec = Spec(parts, rule, None, interpret, start.inner_momentum is not None)
        fresh = {} if documents is None else _documents(documents, whole // ROWS)
        if readout is not None:
            last, reads = self_modifying(spec, last, tokens, readout, fresh, whole)
        else:
            last, reads = _whole_chunks(spec, last, tokens, fresh, whole)
    if whole == length:
        return reads, last
    rest = jax.tree.map(lambda a: a[..., whole:].astype(jnp.float32), tokens)
    if documents is not None:
        documents = documents._replace(begins=documents.begins[:, -1:])
    after, last = mlp_memory_xla(last, rest, readout, documents, rule=rule, chunk_size=ROWS)
    if reads is not None and after is not None:
        after = jnp.concatenate([reads, after], axis=-1)
    return after, last


def _check(start: FastWeights, tokens: Tokens, rule: Rule, chunk_size: int) -> int:
    """The bfloat16 parts of a matrix, if the kernel takes the call."""
    *_, d, f = start.outer.shape
    other = "use implementation='xla'"
    given = {a.dtype for a in (tokens.queries, tokens.keys, tokens.values) if a is not None}
    if start.outer.dtype != jnp.float32 or not given <= {jnp.dtype("bfloat16"), jnp.dtype("f4")}:
        names = ", ".join(sorted(dtype.name for dtype in given))
        raise NotImplementedError(
            f"the GPU kernel takes bfloat16 or float32, not {names} with a {start.outer.dtype} "
            f"state: {other}"
        )
    if rule.adaptive_query:
        raise NotImplementedError(f"the GPU kernel generates no queries (adaptive_query): {other}")
    if chunk_size != ROWS:
        raise NotImplementedError(
            f"the GPU kernel solves chunks of {ROWS} tokens, a warpgroup's tile, not {chunk_size}"
        )
    parts = 1 if given == {jnp.dtype("bfloat16")} else 2
    if (f, d) != (ROWS, ROWS):
        # V, U and their cotangents, ten tiles of 64 tokens
        needed = 2 * parts * (4 * f * d + 10 * ROWS * max(f, d))
        raise NotImplementedError(
            f"the GPU kernel takes memories of {ROWS} x {ROWS}, not {f} x {d}: these take {needed} "
            f"of a block's {SMEM_LIMIT} bytes of shared memory and {2 * f * d // 128} of the 255 "
            f"registers of a thread before any work; {other}"
        )
    momentum = start.inner_momentum is not None
    needed = shared_bytes(Spec(parts, rule, "running", momentum=momentum), backward=True)
    if needed > SMEM_LIMIT:
        raise NotImplementedError(
            f"the GPU kernel takes float32 tokens without momentum only: with it {needed} bytes of "
            f"shared memory, a block has {SMEM_LIMIT}; use bfloat16 or implementation='xla'"
        )
    return parts


def _documents(documents: Documents, chunks: int) -> dict[str, Any]:
    begins = documents.begins[:, :chunks].astype(jnp.float32)
    return {"begins": begins, "fresh_inner": documents.inner, "fresh_outer": documents.outer}


def _some(documents: dict[str, Any], memories: slice) -> dict[str, Any]:
    """The documents of some memories of a group."""
    return {n: a if n == "begins" else a[:, memories] for n, a in documents.items()}


def _whole_chunks(spec: Spec, start: FastWeights, tokens: Tokens, documents: dict, whole: int):
    """The fast weights after the whole chunks of a given context and the reads, [H, d, whole]."""
    rule = spec.rule
    tiles = {n: getattr(tokens, n) for n in ("keys", "values", "queries")}
    tiles = {n: as_tiles(a[..., :whole], spec.dtype) for n, a in tiles.items() if a is not None}
    queries = tiles.pop("queries", None)
    vectors = _vectors(tiles["keys"], tokens, whole, rule)
    read = 0 if queries is None else 1
    unread, reads, pieces = start.outer.shape[1] - read, None, []
    if unread:
        some = slice(0, unread)
        matrices = tuple(a[:, some] for a in start if a is not None)
        pieces.append(_loop(spec, tiles, vectors, _some(documents, some), matrices)[0])
    if queries is not None:
        spec, tiles = spec._replace(read=rule.read), tiles | {"queries": queries}
        some = slice(unread, None)
        matrices = tuple(a[:, some] for a in start if a is not None)
        last, reads = _loop(spec, tiles, vectors, _some(documents, some), matrices)
        pieces.append(last)
        reads = jnp.swapaxes(reads.reshape(reads.shape[0], whole, ROWS), -1, -2)
    made = [jnp.concatenate(a, axis=1) for a in zip(*pieces, strict=True)]
    return FastWeights(*made, *(None,) * (4 - len(made))), reads


def _vectors(keys, tokens: Tokens, whole: int, rule: Rule):
    """Numbers of tokens, each [H, N, 64]; those that only keys and gates make, JAX pulls back."""
    gates = {n: getattr(tokens, n) for n in ("learning_rate", "decay", "momentum")}
    gates = {n: a[:, :whole].astype(jnp.float32) for n, a in gates.items() if a is not None}
    gates = {n: a.reshape(-1, whole // ROWS, ROWS) for n, a in gates.items()}
    learning_rate, size = gates["learning_rate"], jnp.sum(keys.astype(jnp.float32) ** 2, axis=-1)
    made = {n: a if n == "learning_rate" else logs_of(a) for n, a in gates.items()}
    if rule.inner_clip is not None:
        made["size"] = size
    if erases_of(rule)[0]:
        made["erase"] = erase_of(learning_rate, size, rule)
    return made


def _tokens(spec: Spec, tiles: dict, vectors: dict, documents: dict):
    made = {n: as_parts(a, spec.parts) for n, a in tiles.items()}
    numbers = vectors | log_sums(vectors["decay"])
    if spec.momentum:
        numbers |= momentum_sums(vectors["decay"], vectors["momentum"])
    return made | {"vectors": stacked(numbers, spec.vectors)} | documents


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(spec: Spec, tiles: dict, vectors: dict, documents: dict, matrices: tuple):
    """The matrices after the last token and the reads.

    `vectors["decay"]` and `vectors["momentum"]` are logarithms.
    """
    return _loop_fwd(spec, tiles, vectors, documents, matrices, keep_states=False)[0]


def _loop_fwd(spec, tiles, vectors, documents, matrices, keep_states=True):
    given = _tokens(spec, tiles, vectors, documents)
    found = forward(spec, given, matrices, keep_states=keep_states)
    reads = summed(found["reads"], spec.dtype) if spec.read else None
    starts = tuple(found[f"{n}s"] for n in spec.matrices) if keep_states else None
    last = tuple(found[n] for n in spec.matrices)
    return (last, reads), (tiles, vectors, documents, starts)


def _loop_bwd(spec, kept, cotangents):
    tiles, vectors, documents, starts = kept
    of_matrices, of_reads = cotangents
    given = _tokens(spec, tiles, vectors, documents)
    if spec.read:
        given["of_reads"] = as_parts(of_reads, spec.parts)
    found = backward(spec, given, starts, of_matrices)
    # over the parts and the memories
    wide = {n: jnp.sum(found[n], axis=(0, 2), dtype=jnp.float32) for n in tiles}
    if spec.read:  # of q + U s(V q) the kernel pulls back the second term
        wide["queries"] = wide["queries"] + of_reads.astype(jnp.float32)
    of_tiles = {n: wide[n].astype(a.dtype) for n, a in tiles.items()}
    of_numbers = jnp.sum(found["vectors"], axis=1)
    of = {name: of_numbers[..., i, :] for i, name in enumerate(spec.gradients)}
    of_vectors = {n: of[n] for n in ("learning_rate", "size", "erase") if n in vectors}
    running = None if spec.read == "anchor" else spec.read
    of_vectors["decay"] = of_logs(of, erase="erase" in vectors, read=running)
    if spec.momentum:
        more, of_vectors["momentum"] = of_momentum_logs(of, vectors["decay"], vectors["momentum"])
        of_vectors["decay"] = of_vectors["decay"] + more
    of_documents = {n: found.get(n, jnp.zeros_like(a)) for n, a in documents.items()}
    return of_tiles, of_vectors, of_documents, tuple(found[n] for n in spec.matrices)


_loop.defvjp(_loop_fwd, _loop_bwd)
