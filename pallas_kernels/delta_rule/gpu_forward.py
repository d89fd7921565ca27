"""The chunked delta rule forward, as one Mosaic GPU kernel for Hopper (C6.8, C6.9).

A block of one warpgroup takes 64 rows of one sequence's memory through all its chunks of 64 tokens;
the memory stays in registers. With `A` the overlaps of keys times their decays, strictly lower,
`T = (I + erase A)^-1`, the erased and the written together are

    Z = T (erase g X W^T + rate E),   W' = g_C W - (tail Z)^T X,   O = g Q W^T - (decay Q X^T) Z.

Decays are exponentials of differences of log sums; see `VECTORS`.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_tiles import ROWS, Flipped, Warpgroup, tile

# Numbers of a token, and log sums of keep: to it, to the one before, from it to the chunk's end,
# and of the whole chunk (64 times the same).
VECTORS = ("rate", "erase", "at", "before", "tail", "total")
_COMPILER = 4096  # bytes of shared memory for barriers and for sums across warps


class Spec(NamedTuple):
    """What a pair of kernels is compiled for.

    Attributes:
      parts: bfloat16 parts of a matrix: 1 for bfloat16 tokens, 2 for float32.
      keep: whether the memory forgets.
      erase: whether it erases along the key.
      read: "running_prev", "running", or None for no reads.
      save_every: k, chunks between two states that the forward pass stores; divides the chunks.
      interpret: parameters of Mosaic GPU's interpreter, or False.
    """

    parts: int
    keep: bool
    erase: bool
    read: str | None
    save_every: int
    interpret: Any = False


class Sizes(NamedTuple):
    """Of the arrays of a call: sequences S, chunks N, the memory's m x n."""

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
        made["work"] = of_tile(5, ROWS, ROWS)
        if spec.read:
            made["of_reads"] = of_tile(slots, ROWS, ROWS)
    return made


def shared_bytes(spec: Spec, n: int, *, slots: int, backward: bool) -> int:
    """Bytes of shared memory of a block: its scratch, aligned, and the compiler's own."""
    made = scratch(spec, n, slots=slots, backward=backward).values()
    sizes = (math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in made)
    return sum(-(-size // 1024) * 1024 for size in sizes) + _COMPILER


def given_dtype(spec):
    """The dtype that tokens came in."""
    return jnp.float32 if spec.parts == 2 else jnp.bfloat16


class Chunk(NamedTuple):
    """One chunk's tokens in shared memory, and the warpgroup that works on them."""

    spec: Spec
    on: Warpgroup
    x: Any
    error: Any
    vectors: Any
    queries: Any = None
    of_reads: Any = None

    def rows(self, name, columns=ROWS):
        """A vector along the rows of a matrix [64, columns]."""
        return self.on.along_rows(self.vectors.at[VECTORS.index(name)], columns)

    def vector(self, name):
        """A vector as it comes from sums along rows, [64]."""
        return self.on.vector(self.vectors.at[VECTORS.index(name)])

    def decay(self, name, columns=ROWS):
        """exp of a vector of log sums along the rows."""
        return jnp.exp(self.rows(name, columns))

    def table(self, matrix, *, read=None):
        """A matrix [t, i] times the decay from i to the token before t (to t for "running")."""
        inclusive = read == "running"
        if inclusive:
            keep = lambda t, i: i <= t  # noqa: E731
        else:
            keep = lambda t, i: i < t  # noqa: E731
        if not self.spec.keep:
            return self.on.masked(matrix, keep)
        until = self.rows("at" if inclusive else "before")
        since = self.on.along_columns(self.vectors.at[VECTORS.index("at")])
        # masked before exp, so that nothing overflows
        return matrix * jnp.exp(self.on.masked(until - since, keep, other=-jnp.inf))


def overlaps(chunk: Chunk):
    """A: the overlaps of the keys times what is left of the earlier one at the later."""
    return chunk.table(chunk.on.product((chunk.x, Flipped(chunk.x))))


def solve(chunk: Chunk, state, work, *, keep=None):
    """Find Z; `work` is two tiles that hold nothing of use afterwards.

    `keep` is two tiles that take T and X W^T for the backward pass. Values are loaded where they
    are used, not before: registers are what there is least of.
    """
    on, spec = chunk.on, chunk.spec
    if not spec.erase:
        return chunk.rows("rate") * on.get(chunk.error)
    inverse = on.inverse(chunk.rows("erase") * overlaps(chunk), work.at[0], work.at[1])
    if keep:
        on.put(keep[0], inverse)
    seen = on.product((chunk.x, Flipped(state)))
    if keep:
        on.put(keep[1], seen)
    scale = chunk.rows("erase")
    if spec.keep:
        scale = scale * chunk.decay("before")
    on.put(work.at[1], scale * seen + chunk.rows("rate") * on.get(chunk.error))
    return on.product((on.split(inverse), work.at[1]))


def advance(chunk: Chunk, weight, total, work):
    """The memory after the chunk; `work` is a tile."""
    on, columns = chunk.on, weight.shape[1]
    if chunk.spec.keep:
        weight = chunk.decay("total", columns) * weight
        total = chunk.decay("tail") * total
    on.put(work, -total)
    return weight + on.product((Flipped(work), chunk.x))


def fetch_chunk(spec, refs, smem, arrived, where, at, slot, names):
    """Start copying a chunk's tokens; `where` is (sequence, block)."""
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
    names = ("x", "error", "vectors", "queries", "of_reads")
    held = {name: smem[name].at[slot] for name in names if name in smem}
    return Chunk(spec, Warpgroup(spec.parts, bool(spec.interpret)), **held)


def where():
    """The sequence and the block of 64 rows of its memory that this block works on."""
    return lax.axis_index("sequence"), lax.axis_index("block")


def launch(body, spec, sizes, outputs, held, barriers, name):
    """A kernel of one warpgroup for every sequence and 64 rows of its memory."""
    return plgpu.kernel(
        body,
        out_type=outputs,
        grid=(sizes.sequences, sizes.m // ROWS),
        grid_names=("sequence", "block"),
        scratch_types={**held, **barriers},
        interpret=spec.interpret,
        kernel_name=name,
    )


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
            total = solve(chunk, smem["state"], smem["work"])
            if spec.read:
                smem["out"][...] = _read(chunk, smem["state"], total, smem["work"].at[1]).astype(
                    given_dtype(spec)
                )
                plgpu.commit_smem()
                rows = pl.ds(block * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(smem["out"], refs["reads"].at[sequence, at, :, rows])
            return advance(chunk, weight, total, smem["work"].at[0])

        def store_state(at):
            index = lax.div(at, spec.save_every)
            for part in range(parts):
                target = refs["starts"].at[part, sequence, index, block]
                plgpu.copy_smem_to_gmem(smem["state"].at[part], target)

        first = on.load(refs["start"].at[sequence, block])
        refs["final"][sequence, block] = lax.fori_loop(0, sizes.chunks, step, first)
        plgpu.wait_smem_to_gmem(0)

    barriers = {"arrived": plgpu.Barrier(num_arrivals=copies(spec, names), num_barriers=slots)}
    kernel = launch(body, spec, sizes, [*made.values()], held, barriers, "delta_rule_forward")
    start = start.reshape(made["final"].shape)
    found = dict(zip(made, kernel(*(tokens[n] for n in names), start), strict=True))
    found["final"] = found["final"].reshape(sizes.sequences, sizes.m, sizes.n)
    return found


def output_tile(spec, columns):
    """Shared memory for [64, columns] on their way out."""
    dtype = given_dtype(spec)
    width = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((ROWS, columns), dtype, transforms=transforms)


def _read(chunk: Chunk, state, total, work):
    """What the queries of a chunk read; `work` is a tile."""
    on, spec = chunk.on, chunk.spec
    found = on.product((chunk.queries, Flipped(state)))
    if spec.keep:
        found = chunk.decay("at" if spec.read == "running" else "before") * found
    scores = chunk.table(on.product((chunk.queries, Flipped(chunk.x))), read=spec.read)
    on.put(work, total)
    return found - on.product((on.split(scores), work))
