"""The chunked delta rule forward, as one Mosaic GPU kernel for Hopper (C6.8, C6.9).

A block of one warpgroup takes 64 rows of one sequence's memory through all its chunks of 64 tokens;
the memory stays in registers. The algebra is that of `gpu_chunk`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._gpu.tiles import ROWS, Warpgroup, launch, scratch_bytes, tile, where
from pallas_kernels.delta_rule.gpu_chunk import VECTORS, Chunk, advance, read, solve


class Spec(NamedTuple):
    """What a pair of kernels is compiled for.

    Attributes:
      parts: bfloat16 parts of a matrix: 1 for bfloat16 tokens, 2 for float32.
      decay: whether the memory forgets.
      erase: whether it erases along the key.
      read: "running_prev", "running", or None for no reads.
      save_every: k, chunks between two states that the forward pass stores; divides the chunks.
      interpret: parameters of Mosaic GPU's interpreter, or False.
    """

    parts: int
    decay: bool
    erase: bool
    read: str | None
    save_every: int
    interpret: Any = False


class Sizes(NamedTuple):
    """Sizes of the arrays of a call: sequences S, chunks N, the memory's m x n."""

    sequences: int
    chunks: int
    m: int
    n: int


def sizes_of(error, start):
    """From error [P, S, N, 64, m] and a memory [S, m, n]."""
    return Sizes(*error.shape[1:3], *start.shape[-2:])


def scratch(spec: Spec, n: int, *, slots: int, backward: bool) -> dict[str, Any]:
    """The shared memory of one block."""
    of_tile = partial(tile, parts=spec.parts)
    made = {
        "x": of_tile(slots, ROWS, n),
        "error": of_tile(slots, ROWS, ROWS),
        "vectors": plgpu.SMEM((slots, len(VECTORS), ROWS), jnp.float32),
    }
    if spec.read:
        made["queries"] = of_tile(slots, ROWS, n)
    if spec.read or backward:
        made["out"] = output_tile(spec, ROWS)
    if not backward:
        made["state"] = of_tile(ROWS, n)
        made["work"] = of_tile(2, ROWS, ROWS)
    else:
        made["states"] = of_tile(spec.save_every, ROWS, n)
        made["back"] = of_tile(ROWS, n)
        if n != ROWS:
            made["wide"] = output_tile(spec, n)
        made["work"] = of_tile(4, ROWS, ROWS)
        if spec.read:
            made["of_reads"] = of_tile(slots, ROWS, ROWS)
    return made


def shared_bytes(spec: Spec, n: int, *, slots: int, backward: bool) -> int:
    """Bytes of shared memory of a block."""
    return scratch_bytes(scratch(spec, n, slots=slots, backward=backward))


def given_dtype(spec):
    """The dtype that tokens came in."""
    return jnp.float32 if spec.parts == 2 else jnp.bfloat16


def fetch_chunk(spec, refs, smem, arrived, where, at, slot, names):
    """Start copying a chunk's tokens; `where` is (sequence, block).

    One thread issues the copies, so all threads must be done with what the tiles held before.
    """
    plgpu.commit_smem()
    sequence, block = where
    rows = pl.ds(block * ROWS, ROWS)
    for name in names:
        if name == "vectors":
            plgpu.copy_gmem_to_smem(
                refs[name].at[sequence, at], smem[name].at[slot], arrived.at[slot]
            )
            continue
        for part in range(spec.parts):
            source = refs[name].at[part, sequence, at]
            if name in ("error", "of_reads"):  # of the memory's rows
                source = refs[name].at[part, sequence, at, :, rows]
            plgpu.copy_gmem_to_smem(source, smem[name].at[slot, part], arrived.at[slot])


def copies(spec, names):
    """How many copies `fetch_chunk` makes."""
    return sum(1 if name == "vectors" else spec.parts for name in names)


def chunk_of(spec, smem, slot):
    """The chunk whose tokens are in a slot."""
    names = ("x", "error", "queries", "of_reads")
    tokens = {name: smem[name].at[slot] for name in names if name in smem}
    vectors = {name: smem["vectors"].at[slot, i] for i, name in enumerate(VECTORS)}
    on = Warpgroup(spec.parts, bool(spec.interpret))
    return Chunk(on, spec.decay, spec.erase, spec.read, **tokens, vectors=vectors)


def forward(spec: Spec, tokens: dict[str, Any], start: Any, *, slots: int, keep_states: bool):
    """Run the chunks of every sequence.

    Args:
      spec: see `Spec`.
      tokens: x [P, S, N, 64, n], error [P, S, N, 64, m], vectors [S, N, 6, 64] and, where there
        are reads, queries [P, S, N, 64, n], in P parts.
      start: [S, m, n], float32.
      slots: chunks whose tokens are in shared memory at once, 1 or 2.
      keep_states: whether to give the chunks' starts for the backward pass.

    Returns:
      A dict of final [S, m, n], reads [S, N, 64, m] and starts [P, S, N / k, m, n].
    """
    sizes = sizes_of(tokens["error"], start)
    names = [n for n in ("x", "error", "vectors", "queries") if n in tokens]
    blocks, parts = sizes.m // ROWS, spec.parts
    shape = jax.ShapeDtypeStruct
    made = {"final": shape((sizes.sequences, blocks, ROWS, sizes.n), jnp.float32)}
    if spec.read:
        made["reads"] = shape((sizes.sequences, sizes.chunks, ROWS, sizes.m), given_dtype(spec))
    if keep_states:
        stored = (parts, sizes.sequences, sizes.chunks // spec.save_every, blocks, ROWS, sizes.n)
        made["starts"] = shape(stored, jnp.bfloat16)
    held = scratch(spec, sizes.n, slots=slots, backward=False)

    def body(*arguments, **smem):
        refs = dict(zip((*names, "start", *made), arguments, strict=True))
        arrived, (sequence, block) = smem.pop("arrived"), where()
        on = Warpgroup(parts, bool(spec.interpret))
        fetch = partial(fetch_chunk, spec, refs, smem, arrived, (sequence, block), names=names)
        if slots == 2:
            fetch(0, 0)

        def step(at, weight):
            slot = lax.rem(at, slots)
            if slots == 1:
                fetch(at, 0)
            else:
                pl.when(at + 1 < sizes.chunks)(lambda: fetch(at + 1, 1 - slot))
            plgpu.wait_smem_to_gmem(0)  # the copies of the chunk before
            on.put(smem["state"], weight)
            if keep_states:
                pl.when(lax.rem(at, spec.save_every) == 0)(lambda: store_state(at))
            plgpu.barrier_wait(arrived.at[slot])
            chunk = chunk_of(spec, smem, slot)
            work = smem["work"].at[0], smem["work"].at[1]
            total = solve(chunk, smem["state"], work)
            if spec.read:
                found = read(chunk, smem["state"], total, work[1])
                smem["out"][...] = found.astype(given_dtype(spec))
                plgpu.commit_smem()
                rows = pl.ds(block * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(smem["out"], refs["reads"].at[sequence, at, :, rows])
            return advance(chunk, weight, total, work[0])

        def store_state(at):
            index = lax.div(at, spec.save_every)
            for part in range(parts):
                target = refs["starts"].at[part, sequence, index, block]
                plgpu.copy_smem_to_gmem(smem["state"].at[part], target)

        first = on.load(refs["start"].at[sequence, block])
        refs["final"][sequence, block] = lax.fori_loop(0, sizes.chunks, step, first)
        plgpu.wait_smem_to_gmem(0)

    barriers = {"arrived": plgpu.Barrier(num_arrivals=copies(spec, names), num_barriers=slots)}
    kernel = launch(
        body,
        (sizes.sequences, blocks),
        [*made.values()],
        {**held, **barriers},
        name="delta_rule_forward",
        interpret=spec.interpret,
    )
    start = start.reshape(made["final"].shape)
    found = dict(zip(made, kernel(*(tokens[n] for n in names), start), strict=True))
    found["final"] = found["final"].reshape(sizes.sequences, sizes.m, sizes.n)
    return found


def output_tile(spec, columns):
    """Shared memory for an output [64, columns] before it is copied to global memory."""
    dtype = given_dtype(spec)
    width = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((ROWS, columns), dtype, transforms=transforms)
