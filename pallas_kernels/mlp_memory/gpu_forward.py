"""The deep memory forward, as one Mosaic GPU kernel for Hopper.

A block of one warpgroup takes one memory M(z) = z + U s(V z) through all its chunks of 64 tokens;
V and U, 64 x 64 each, stay in registers. See `gpu_cell` for a chunk's writes and
`delta_rule.gpu_chunk` for the delta rule that both matrices follow.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.delta_rule import gpu_chunk
from pallas_kernels.gpu_tiles import ROWS, Warpgroup, launch, scratch_bytes, tile, where
from pallas_kernels.mlp_memory.gpu_cell import VECTORS, Cell, gelu, predict
from pallas_kernels.mlp_memory.types import Rule

FRESH = ("fresh_inner", "fresh_outer")
_WORK = ("work0", "work1", "work2", "work3")
_TOKENS = ("keys", "values", "vectors", "queries")
_FORWARD = ("keys", "values", "queries", "inner", "outer", "error", "steep", "hidden", "out")
# Where a tile holds one thing after another, the backward pass says so.
_BACKWARD = (
    *("keys", "inner", "outer", "error"),
    *("first", "second", "third", "fourth", "fifth", "of_error"),
    *_WORK,
)


class Spec(NamedTuple):
    """What a pair of kernels is compiled for.

    Attributes:
      parts: bfloat16 parts of a matrix: 1 for bfloat16 tokens, 2 for float32.
      rule: see `Rule`.
      read: that of the rule, or None for no reads.
      interpret: parameters of Mosaic GPU's interpreter, or False.
    """

    parts: int
    rule: Rule
    read: str | None
    interpret: Any = False

    @property
    def dtype(self) -> Any:
        """Of the tokens as they came in."""
        return jnp.float32 if self.parts == 2 else jnp.bfloat16


def scratch(spec: Spec, *, backward: bool) -> dict[str, Any]:
    """The shared memory of one block: tiles by name, and the vectors of a chunk."""
    names = _BACKWARD if backward else (*_FORWARD, *_WORK[:2])
    unread = () if backward or spec.read else ("queries", "out")
    tiles = {n: tile(ROWS, ROWS, parts=spec.parts) for n in names if n not in unread}
    return tiles | {"vectors": plgpu.SMEM((len(VECTORS), ROWS), jnp.float32)}


def shared_bytes(spec: Spec, *, backward: bool) -> int:
    """Bytes of shared memory of a block."""
    return scratch_bytes(scratch(spec, backward=backward))


def fetch(spec: Spec, refs, smem, here, names: dict[str, str], barrier) -> None:
    """Start copying matrices by name into tiles by name; `here` is (sequence, memory, chunk)."""
    sequence, memory, at = here
    for name, target in names.items():
        if name == "vectors":
            plgpu.copy_gmem_to_smem(refs[name].at[sequence, at], smem[target], barrier)
            continue
        index = (sequence, memory, at) if name in ("inner", "outer") else (sequence, at)
        for part in range(spec.parts):
            source = refs[name].at[(part, *index)]
            plgpu.copy_gmem_to_smem(source, smem[target].at[part], barrier)


def copies(spec: Spec, names) -> int:
    """How many copies `fetch` makes."""
    return sum(1 if name == "vectors" else spec.parts for name in names)


def send(spec: Spec, tile, ref, index) -> None:
    """Start copying a tile, just stored, to global memory [P, *index, 64, 64]."""
    for part in range(spec.parts):
        plgpu.copy_smem_to_gmem(tile.at[part], ref.at[(part, *index)])


def cell_of(spec: Spec, smem, *, steep: str) -> Cell:
    """The chunk whose tokens are in shared memory; `steep` is the tile for G."""
    return Cell(
        Warpgroup(spec.parts, bool(spec.interpret)),
        spec.rule,
        keys=smem["keys"],
        inner=smem["inner"],
        outer=smem["outer"],
        error=smem["error"],
        steep=smem[steep],
        vectors={name: smem["vectors"].at[i] for i, name in enumerate(VECTORS)},
    )


def begins(refs, sequence, at):
    """Whether a chunk is the first of a document; None without documents."""
    return refs["begins"][sequence, at] > 0.5 if "begins" in refs else None


def load(on: Warpgroup, refs, names, index):
    """Float32 matrices of global memory by name."""
    return tuple(on.load(refs[name].at[index]) for name in names)


def forward(spec: Spec, tokens: dict[str, Any], inner: Any, outer: Any, *, keep_states: bool):
    """Run the chunks of every sequence and memory.

    Args:
      spec: see `Spec`.
      tokens: keys, values [P, S, N, 64, 64], vectors [S, N, 7, 64] and, where there are reads,
        queries [P, S, N, 64, 64], in P parts; with documents begins [S, N] and the weights that
        they begin with, fresh_inner and fresh_outer, as inner and outer.
      inner: V [S, M, 64, 64], float32.
      outer: U [S, M, 64, 64], float32.
      keep_states: whether to give the chunks' starts for the backward pass.

    Returns:
      A dict of inner and outer, those after the last token, reads [P, S, N, 64, 64] (of the last
      memory to write them: there is one where there are reads) and the starts of_inner and of_outer
      [P, S, M, N, 64, 64].
    """
    names: dict[str, str] = {n: n for n in _TOKENS if n in tokens}
    (sequences, memories), chunks = inner.shape[:2], tokens["vectors"].shape[1]
    made = {n: jax.ShapeDtypeStruct(inner.shape, jnp.float32) for n in ("inner", "outer")}
    if spec.read:
        made["reads"] = jax.ShapeDtypeStruct(tokens["keys"].shape, jnp.bfloat16)
    if keep_states:
        shape = (spec.parts, sequences, memories, chunks, ROWS, ROWS)
        made |= {n: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for n in ("inners", "outers")}

    def body(*arguments, **smem):
        given = (*tokens, "first_inner", "first_outer", *made)
        refs = dict(zip(given, arguments, strict=True))
        arrived, (sequence, memory) = smem.pop("arrived"), where()
        on = Warpgroup(spec.parts, bool(spec.interpret))

        def one_chunk(at, weights):
            plgpu.wait_smem_to_gmem(0)  # the copies of the chunk before
            fetch(spec, refs, smem, (sequence, memory, at), names, arrived)
            begin = begins(refs, sequence, at)
            if begin is not None:
                fresh = lambda: load(on, refs, FRESH, (sequence, memory))  # noqa: E731
                weights = lax.cond(begin, fresh, lambda w=weights: w)
            for name, weight in zip(("inner", "outer"), weights, strict=True):
                on.put(smem[name], weight)
                if keep_states:
                    send(spec, smem[name], refs[f"{name}s"], (sequence, memory, at))
            plgpu.barrier_wait(arrived)
            weights, found = step(spec, smem, weights)
            if found is not None:
                on.put(smem["out"], found)
                send(spec, smem["out"], refs["reads"], (sequence, at))
            return weights

        first = load(on, refs, ("first_inner", "first_outer"), (sequence, memory))
        last = lax.fori_loop(0, chunks, one_chunk, first)
        for name, weight in zip(("inner", "outer"), last, strict=True):
            refs[name][sequence, memory] = weight
        plgpu.wait_smem_to_gmem(0)

    barriers = {"arrived": plgpu.Barrier(num_arrivals=copies(spec, names))}
    kernel = launch(
        body,
        (sequences, memories),
        [*made.values()],
        scratch(spec, backward=False) | barriers,
        name="mlp_memory_forward",
        interpret=spec.interpret,
    )
    return dict(zip(made, kernel(*tokens.values(), inner, outer), strict=True))


def step(spec: Spec, smem, weights):
    """V and U after a chunk, and M(q), or None."""
    cell = cell_of(spec, smem, steep="steep")
    on, work, found = cell.on, (smem["work0"], smem["work1"]), None
    norms = cell.write(smem["values"], smem["hidden"])
    inner, outer = cell.chunks(norms, smem["hidden"], read=spec.read)
    if inner.read:
        inner = inner._replace(queries=smem["queries"])
        outer = outer._replace(queries=smem["values"])
    elif spec.read:  # at the anchor
        found = predict(on, smem["queries"], (cell.inner, cell.outer))
    total = gpu_chunk.solve(inner, cell.inner, work)
    if inner.read:  # the values are written by now
        on.put(smem["values"], gelu(gpu_chunk.read(inner, cell.inner, total, work[1])))
    of_inner = gpu_chunk.advance(inner, weights[0], total, work[0])
    total = gpu_chunk.solve(outer, cell.outer, work)
    if outer.read:
        found = on.get(smem["queries"]) + gpu_chunk.read(outer, cell.outer, total, work[1])
    return (of_inner, gpu_chunk.advance(outer, weights[1], total, work[0])), found
