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

from pallas_kernels._gpu.tiles import ROWS, Warpgroup, launch, scratch_bytes, tile, where
from pallas_kernels.delta_rule import gpu_chunk, gpu_momentum
from pallas_kernels.mlp_memory.gpu_cell import VECTORS, Cell, gelu, predict
from pallas_kernels.mlp_memory.types import Rule

MATRICES = ("inner", "outer", "inner_momentum", "outer_momentum")
FRESH = ("fresh_inner", "fresh_outer")
_WORK = ("work0", "work1", "work2", "work3")
_MORE_WORK = tuple(f"work{i}" for i in range(4, gpu_momentum.WORK))
_TOKENS = ("keys", "values", "vectors", "queries")
_FORWARD = ("keys", "values", "queries", "inner", "outer", "error", "steep", "hidden", "out")
# Tiles are reused: what each holds, one after another, is said in `gpu_backward.pull`.
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
      momentum: whether the memory has one.
    """

    parts: int
    rule: Rule
    read: str | None
    interpret: Any = False
    momentum: bool = False

    @property
    def matrices(self) -> tuple[str, ...]:
        """What a memory is, by name: V and U, with momentum also S of both."""
        return MATRICES if self.momentum else MATRICES[:2]

    @property
    def vectors(self) -> tuple[str, ...]:
        """The numbers of a token, by name."""
        return (*VECTORS, *gpu_momentum.VECTORS) if self.momentum else VECTORS

    @property
    def gradients(self) -> tuple[str, ...]:
        """What the backward kernel gives for them."""
        more = gpu_momentum.GRADIENTS if self.momentum else ()
        return (*VECTORS, "pairs", *more)

    @property
    def delta(self) -> Any:
        """The module of the delta rule that both matrices follow."""
        return gpu_momentum if self.momentum else gpu_chunk

    def each(self, matrices: Any) -> tuple[Any, Any]:
        """Of `matrices` what the delta rules of V and of U take, with momentum pairs."""
        matrices = tuple(matrices)
        if not self.momentum:
            return matrices
        return matrices[0::2], matrices[1::2]

    def together(self, inner: Any, outer: Any) -> tuple[Any, ...]:
        """The inverse of `each`."""
        if not self.momentum:
            return inner, outer
        return inner[0], outer[0], inner[1], outer[1]

    @property
    def dtype(self) -> Any:
        """Of the tokens as they came in."""
        return jnp.float32 if self.parts == 2 else jnp.bfloat16


def scratch(spec: Spec, *, backward: bool) -> dict[str, Any]:
    """The shared memory of one block: tiles by name, and the vectors of a chunk."""
    names = _BACKWARD if backward else (*_FORWARD, *_WORK[:2])
    if spec.momentum:
        names = (*names, *MATRICES[2:], "theta", "written")
        names = (*names, "sixth", *_MORE_WORK) if backward else names
    unread = () if backward or spec.read else ("queries", "out")
    tiles = {n: tile(ROWS, ROWS, parts=spec.parts) for n in names if n not in unread}
    return tiles | {"vectors": plgpu.SMEM((len(spec.vectors), ROWS), jnp.float32)}


def shared_bytes(spec: Spec, *, backward: bool) -> int:
    """Bytes of shared memory of a block."""
    return scratch_bytes(scratch(spec, backward=backward))


def fetch(spec: Spec, refs, smem, here, names: dict[str, str], barrier) -> None:
    """Start copying matrices by name into tiles by name; `here` is (sequence, memory, chunk).

    One thread issues the copies, so all threads must be done with what the tiles held before.
    """
    plgpu.commit_smem()
    sequence, memory, at = here
    for name, target in names.items():
        if name == "vectors":
            plgpu.copy_gmem_to_smem(refs[name].at[sequence, at], smem[target], barrier)
            continue
        index = (sequence, memory, at) if name in MATRICES else (sequence, at)
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
        vectors={name: smem["vectors"].at[i] for i, name in enumerate(spec.vectors)},
        theta=smem.get("theta"),
        written=smem.get("written"),
    )


def begins(refs, sequence, at):
    """Whether a chunk is the first of a document; None without documents."""
    return refs["begins"][sequence, at] > 0.5 if "begins" in refs else None


def load(on: Warpgroup, refs, names, index):
    """Float32 matrices of global memory by name."""
    return tuple(on.load(refs[name].at[index]) for name in names)


def forward(spec: Spec, tokens: dict[str, Any], matrices: Any, *, keep_states: bool):
    """Run the chunks of every sequence and memory.

    Args:
      spec: see `Spec`.
      tokens: keys, values [P, S, N, 64, 64], vectors [S, N, 7, 64] and, where there are reads,
        queries [P, S, N, 64, 64], in P parts; with documents begins [S, N] and the weights that
        they begin with, fresh_inner and fresh_outer, as inner and outer.
      matrices: `spec.matrices` [S, M, 64, 64], float32.
      keep_states: whether to give the chunks' starts for the backward pass.

    Returns:
      A dict of the matrices after the last token, by name, reads [P, S, N, 64, 64] (there is one
      memory where there are reads) and the chunks' starts [P, S, M, N, 64, 64], by name with an s.
    """
    names: dict[str, str] = {n: n for n in _TOKENS if n in tokens}
    (sequences, memories), chunks = matrices[0].shape[:2], tokens["vectors"].shape[1]
    starts = tuple(f"first_{name}" for name in spec.matrices)
    made = {n: jax.ShapeDtypeStruct(matrices[0].shape, jnp.float32) for n in spec.matrices}
    if spec.read:
        made["reads"] = jax.ShapeDtypeStruct(tokens["keys"].shape, jnp.bfloat16)
    if keep_states:
        shape = (spec.parts, sequences, memories, chunks, ROWS, ROWS)
        made |= {f"{n}s": jax.ShapeDtypeStruct(shape, jnp.bfloat16) for n in spec.matrices}

    def body(*arguments, **smem):
        given = (*tokens, *starts, *made)
        refs = dict(zip(given, arguments, strict=True))
        arrived, (sequence, memory) = smem.pop("arrived"), where()
        on = Warpgroup(spec.parts, bool(spec.interpret))

        def one_chunk(at, weights):
            plgpu.wait_smem_to_gmem(0)  # the copies of the chunk before
            fetch(spec, refs, smem, (sequence, memory, at), names, arrived)
            begin = begins(refs, sequence, at)
            if begin is not None:
                zeros = (on.full(0.0, ROWS),) * (len(weights) - 2)
                fresh = lambda: load(on, refs, FRESH, (sequence, memory)) + zeros  # noqa: E731
                weights = lax.cond(begin, fresh, lambda w=weights: w)
            for name, weight in zip(spec.matrices, weights, strict=True):
                on.put(smem[name], weight)
                if keep_states:
                    send(spec, smem[name], refs[f"{name}s"], (sequence, memory, at))
            plgpu.barrier_wait(arrived)
            weights, found = step(spec, smem, weights)
            if found is not None:
                on.put(smem["out"], found)
                send(spec, smem["out"], refs["reads"], (sequence, at))
            return weights

        first = load(on, refs, starts, (sequence, memory))
        last = lax.fori_loop(0, chunks, one_chunk, first)
        for name, weight in zip(spec.matrices, last, strict=True):
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
    return dict(zip(made, kernel(*tokens.values(), *matrices), strict=True))


def step(spec: Spec, smem, weights):
    """The matrices after a chunk, and M(q), or None."""
    cell = cell_of(spec, smem, steep="steep")
    on, work, found = cell.on, (smem["work0"], smem["work1"]), None
    norms = cell.write(smem["values"], smem["hidden"])
    inner, outer = cell.chunks(norms, smem["hidden"], read=spec.read)
    if inner.read:
        inner = inner._replace(queries=smem["queries"])
        outer = outer._replace(queries=smem["values"])
    elif spec.read:  # at the anchor
        found = predict(on, smem["queries"], (cell.inner, cell.outer))
    delta, states = spec.delta, spec.each(smem[name] for name in spec.matrices)
    of_inner, of_outer = spec.each(weights)
    total = delta.solve(inner, states[0], work)
    if inner.read:  # the values are written by now
        on.put(smem["values"], gelu(delta.read(inner, states[0], total, work[1])))
    of_inner = delta.advance(inner, of_inner, total, work[0])
    total = delta.solve(outer, states[1], work)
    if outer.read:
        found = on.get(smem["queries"]) + delta.read(outer, states[1], total, work[1])
    return spec.together(of_inner, delta.advance(outer, of_outer, total, work[0])), found
