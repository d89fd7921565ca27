"""The backward pass of `gpu_forward`, as one Mosaic GPU kernel.

A block goes through its sequence's chunks from the last to the first with the cotangent of the
memory in registers. It takes k chunks at a time: runs them again from the stored state, leaves
their starts in shared memory, and pulls the cotangents back through one after another.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.delta_rule.gpu_forward import (
    VECTORS,
    Chunk,
    Sizes,
    Spec,
    advance,
    chunk_of,
    copies,
    fetch_chunk,
    given_dtype,
    launch,
    overlaps,
    scratch,
    sizes_of,
    solve,
    where,
)
from pallas_kernels.gpu_tiles import ROWS, Flipped, Warpgroup

# What the kernel gives for `VECTORS`; "pairs" is of the logs of keep themselves.
GRADIENTS = (*VECTORS, "pairs")


class _Carried(NamedTuple):
    """What a backward step works on besides its tokens: references to shared memory.

    Attributes:
      state: the memory at the chunk's start, a tile [64, n].
      back: the cotangent of the memory after the chunk, a tile [64, n].
      work: five tiles [64, 64].
    """

    state: Any
    back: Any
    work: Any


def _pull_read(chunk: Chunk, held: _Carried, give):
    """The cotangent of Z through the reads (to add).

    Leaves that of the scores in `work[2]` and takes Z from `work[1]`.
    """
    on, spec, work = chunk.on, chunk.spec, held.work
    scores = on.product((chunk.queries, Flipped(chunk.x)))
    on.put(work.at[2], chunk.table(scores, read=spec.read))
    of_total = -on.product((Flipped(work.at[2]), chunk.of_reads))
    of_scores = -on.product((chunk.of_reads, Flipped(work.at[1])))
    of_scores = chunk.table(of_scores, read=spec.read)
    on.put(work.at[2], of_scores)
    if spec.keep:
        give("pairs", _pull_pairs(chunk, of_scores * scores, work.at[3], read=spec.read))
    of_queries = on.product((chunk.of_reads, held.state))
    if spec.keep:
        when, columns = _when(spec), held.state.shape[-1]
        of_queries = chunk.decay(when, columns) * of_queries
        give(when, jnp.sum(on.get(chunk.queries) * of_queries, axis=1))
    give("queries", of_queries + on.product((work.at[2], chunk.x)))
    return of_total


def _when(spec):
    return "at" if spec.read == "running" else "before"


def _pull_solve(chunk: Chunk, held: _Carried, of_total, give):
    """The cotangent of what is written, through the solve.

    Leaves that of the overlaps in `work[0]` and that of X W^T in `work[3]`; takes T from `work[0]`,
    Z from `work[1]` and X W^T from `work[4]`.
    """
    on, spec, work = chunk.on, chunk.spec, held.work
    on.put(work.at[3], of_total)
    of_written = on.product((Flipped(work.at[0]), work.at[3]))
    of_seen = of_written
    if spec.keep:
        of_seen = chunk.decay("before") * of_seen
    of_scale = jnp.sum(of_seen * on.get(work.at[4]), axis=1)
    give("erase", of_scale)
    on.put(work.at[3], chunk.rows("erase") * of_seen)
    if spec.keep:
        give("before", chunk.vector("erase") * of_scale)
    of_lower = on.product((on.split(of_written), Flipped(work.at[1])))
    of_lower = -on.masked(of_lower, lambda t, i: i < t)
    of_lower_overlaps = of_lower * overlaps(chunk)  # again: cheaper than registers to keep them
    give("erase", jnp.sum(of_lower_overlaps, axis=1))
    on.put(work.at[0], chunk.table(chunk.rows("erase") * of_lower))
    if spec.keep:
        pairs = chunk.rows("erase") * of_lower_overlaps
        give("pairs", _pull_pairs(chunk, pairs, work.at[4], read=None))
    return of_written


def _pull_pairs(chunk: Chunk, pairs, work, *, read):
    """Of the logs of keep: the sums over pairs (i, t) with i < j < t (j <= t for "running").

    One product and no differences of sums: a keep of 1e-4 multiplies what they would lose.
    """
    on = chunk.on
    on.put(work, pairs)
    earlier = on.masked(on.full(1.0, ROWS), lambda j, i: i < j)
    sums = on.product(((earlier.astype(jnp.bfloat16),), Flipped(work)))
    inside = (lambda j, t: j <= t) if read == "running" else (lambda j, t: j < t)
    return jnp.sum(on.masked(sums, inside), axis=1)


def _pull(chunk: Chunk, held: _Carried, back, give):
    """One chunk backward: gives its tokens' gradients and returns that of the memory before it.

    Args:
      chunk: tokens.
      held: see `_Carried`.
      back: the cotangent of the memory after the chunk, [64, n].
      give: a function of a name and a value; vectors that are given twice are added.
    """
    on, spec, work, columns = chunk.on, chunk.spec, held.work, back.shape[1]
    on.put(held.back, back)
    total = solve(chunk, held.state, work, keep=(work.at[0], work.at[4]))
    on.put(work.at[1], total)
    of_total = -on.product((chunk.x, Flipped(held.back)))
    if spec.keep:
        of_total = chunk.decay("tail") * of_total
        give("tail", jnp.sum(of_total * on.get(work.at[1]), axis=1))
    if spec.read:
        of_total = of_total + _pull_read(chunk, held, give)
    of_written = _pull_solve(chunk, held, of_total, give) if spec.erase else of_total
    give("rate", jnp.sum(of_written * on.get(chunk.error), axis=1))
    give("error", chunk.rows("rate") * of_written)
    total = -on.get(work.at[1])
    if spec.keep:
        total = chunk.decay("tail") * total
    terms = [(on.split(total), held.back)]
    if spec.read:
        terms.append((Flipped(work.at[2]), chunk.queries))
    if spec.erase:
        terms += [(work.at[0], chunk.x), (Flipped(work.at[0]), chunk.x), (work.at[3], held.state)]
    give("x", on.product(*terms))
    if spec.keep:
        back = chunk.decay("total", columns) * back
        give("total", jnp.sum(back * on.get(held.state), axis=1))
    terms = [(Flipped(work.at[3]), chunk.x)] if spec.erase else []
    if spec.read:
        of_reads = on.get(chunk.of_reads)
        if spec.keep:
            of_reads = chunk.decay(_when(spec)) * of_reads
        on.put(work.at[2], of_reads)
        terms.append((Flipped(work.at[2]), chunk.queries))
    return back + on.product(*terms) if terms else back


def _pull_outputs(spec: Spec, sizes: Sizes):
    """The gradients, those of what all rows of a memory share by block of rows."""
    blocks, shape, given = sizes.m // ROWS, jax.ShapeDtypeStruct, given_dtype(spec)
    shared = (blocks, sizes.sequences, sizes.chunks, ROWS, sizes.n)
    made = {
        "x": shape(shared, given),
        "error": shape((sizes.sequences, sizes.chunks, ROWS, sizes.m), given),
        "vectors": shape((*shared[:3], len(GRADIENTS), ROWS), jnp.float32),
        "start": shape((sizes.sequences, blocks, ROWS, sizes.n), jnp.float32),
    }
    if spec.read:
        made["queries"] = shape(shared, given)
    return made


def backward(spec: Spec, tokens: dict[str, Any], starts: Any, of_final: Any) -> dict[str, Any]:
    """Pull cotangents back through `forward`, from the last chunk to the first.

    Args:
      spec: see `Spec`.
      tokens: those of `forward` and, where there are reads, of_reads [P, S, N, 64, m].
      starts: from `forward`.
      of_final: [S, m, n], float32.

    Returns:
      A dict of x and queries [B, S, N, 64, n] and vectors [B, S, N, 7, 64] (see `GRADIENTS`), to
      be summed over the B blocks of rows, error [S, N, 64, m] and start [S, m, n].
    """
    sizes = sizes_of(tokens["error"], of_final)
    names = [n for n in ("x", "error", "vectors", "queries", "of_reads") if n in tokens]
    blocks, every, parts = sizes.chunks // spec.save_every, spec.save_every, spec.parts
    made = _pull_outputs(spec, sizes)
    held = scratch(spec, sizes.n, slots=1, backward=True)

    def body(*arguments, **smem):
        refs = dict(zip((*names, "starts", "of_final"), arguments, strict=False))
        outs = dict(zip(made, arguments[len(refs) :], strict=True))
        sequence, row_block = here = where()
        on = Warpgroup(parts, bool(spec.interpret))
        fetch = partial(fetch_chunk, spec, refs, smem)
        again = [n for n in names if n in ("x", "error", "vectors")]

        def forward_step(j, weight, first):
            fetch(smem["again"], here, first + j, 0, again)
            plgpu.barrier_wait(smem["again"].at[0])
            chunk = chunk_of(spec, smem, 0)
            total = solve(chunk, smem["states"].at[j], smem["work"])
            weight = advance(chunk, weight, total, smem["work"].at[0])
            on.put(smem["states"].at[j + 1], weight)
            return weight

        def back_step(step, back, first):
            j = every - 1 - step
            at = first + j
            fetch(smem["arrived"], here, at, 0, names)
            plgpu.barrier_wait(smem["arrived"].at[0])
            vectors: dict[str, Any] = {}
            give = partial(_give, spec, vectors, outs, smem, (sequence, row_block, at))
            chunk = chunk_of(spec, smem, 0)
            held = _Carried(smem["states"].at[j], smem["back"], smem["work"])
            back = _pull(chunk, held, back, give)
            for i, name in enumerate(GRADIENTS):
                if name in vectors:
                    outs["vectors"][row_block, sequence, at, i] = vectors[name]
            return back

        def block(i, back):
            first = (blocks - 1 - i) * every
            for part in range(parts):
                source = refs["starts"].at[part, sequence, blocks - 1 - i, row_block]
                plgpu.copy_gmem_to_smem(source, smem["states"].at[0, part], smem["begun"].at[0])
            plgpu.barrier_wait(smem["begun"].at[0])
            if every > 1:
                weight = on.get(smem["states"].at[0])
                lax.fori_loop(0, every - 1, partial(forward_step, first=first), weight)
            return lax.fori_loop(0, every, partial(back_step, first=first), back)

        last = on.load(refs["of_final"].at[sequence, row_block])
        outs["start"][sequence, row_block] = lax.fori_loop(0, blocks, block, last)
        plgpu.wait_smem_to_gmem(0)

    barriers = {
        "arrived": plgpu.Barrier(num_arrivals=copies(spec, names), num_barriers=1),
        "again": plgpu.Barrier(num_arrivals=copies(spec, ("x", "error", "vectors"))),
        "begun": plgpu.Barrier(num_arrivals=parts),
    }
    kernel = launch(body, spec, sizes, [*made.values()], held, barriers, "delta_rule_backward")
    of_final = of_final.reshape(made["start"].shape)
    found = dict(zip(made, kernel(*(tokens[n] for n in names), starts, of_final), strict=True))
    found["start"] = found["start"].reshape(sizes.sequences, sizes.m, sizes.n)
    return found


def _give(spec, vectors, outs, smem, here, name, value):
    """Write a matrix of gradients at once: registers are scarce; add vectors up.

    `here` is (sequence, block of rows, chunk).
    """
    sequence, row_block, at = here
    if value.ndim == 1:
        vectors[name] = vectors[name] + value if name in vectors else value
        return
    # through shared memory: 64 x n addresses of global memory would take the registers
    plgpu.wait_smem_to_gmem(0)  # the copy before
    if name == "error":  # some columns of an array that the blocks share
        out, rows = smem["out"], pl.ds(row_block * ROWS, ROWS)
        target = outs[name].at[sequence, at, :, rows]
    else:
        out = smem.get("wide", smem["out"])
        target = outs[name].at[row_block, sequence, at]
    out[...] = value.astype(given_dtype(spec))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, target)
