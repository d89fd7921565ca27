"""Self-modifying memories as one Mosaic GPU kernel each way: a block takes a whole group.

Five memories make each chunk's context together. One block goes through them in turn, chunk by
chunk: their float32 fast weights (or cotangents) stay in global memory, 160 KiB a sequence that the
L2 cache holds, and are loaded into registers for their turn; every thread reads what it wrote.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._gpu.tiles import ROWS, Warpgroup, launch, where
from pallas_kernels.mlp_memory import gpu_backward, gpu_forward
from pallas_kernels.mlp_memory.gpu_cell import VECTORS, pull_predict
from pallas_kernels.mlp_memory.gpu_context import (
    READ,
    READOUT,
    VALUE,
    Context,
    Cotangents,
    generate,
    pull_generate,
)
from pallas_kernels.mlp_memory.gpu_forward import (
    FRESH,
    Spec,
    begins,
    cell_of,
    copies,
    fetch,
    load,
    send,
)


def scratch(spec: Spec, *, backward: bool) -> dict[str, Any]:
    """The scratch of a single memory's kernel, and one vector more."""
    made = gpu_forward.scratch(spec, backward=backward)
    return made | {"vectors": plgpu.SMEM((len(spec.vectors) + 1, ROWS), jnp.float32)}


def _context(spec: Spec, on, smem, refs, sequence, begin, values):
    """The context whose inputs are in the tiles "keys" and `values`."""
    readout = {n: refs["readout"].at[sequence, i] for i, n in enumerate(READOUT)}
    matrices, held = (smem["inner"], smem["outer"]), smem["vectors"].at[len(spec.vectors)]
    return Context(on, spec.rule, smem["keys"], smem[values], matrices, readout, held, begin)


def _each(memories: int, function) -> None:
    """`function(memory)` for each memory in a loop: unrolled it would take more registers."""

    def one(memory, nothing):
        function(memory)
        return nothing

    lax.fori_loop(0, memories, one, 0)


def _store(refs, names, index, values):
    for name, value in zip(names, values, strict=True):
        refs[name][index] = value


def forward(spec: Spec, tokens: dict[str, Any], matrices: Any, *, keep_states: bool):
    """Run the chunks of every sequence.

    Args:
      spec: see `Spec`; it reads.
      tokens: x_keys, x_values and queries [P, S, N, 64, 64] in P parts, readout [S, 4, 64]; with
        documents begins [S, N] and the weights that they begin with, fresh_inner and fresh_outer;
        with momentum the log sums of it, momentum [S, N, 3, 64].
      matrices: `spec.matrices` [S, 5, 64, 64], float32.
      keep_states: whether to give what the backward pass needs.

    Returns:
      A dict of the matrices after the last token, by name, reads [P, S, N, 64, 64], and for the
      backward pass the chunks' starts [P, S, 5, N, 64, 64], by name with an s, and their context:
      keys and values, as the reads are, and vectors [S, N, .., 64], the last of no use.
    """
    (sequences, memories), shape = matrices[0].shape[:2], tokens["x_keys"].shape
    starts = tuple(f"first_{name}" for name in spec.matrices)
    made = {n: jax.ShapeDtypeStruct(matrices[0].shape, jnp.float32) for n in spec.matrices}
    made["reads"] = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if keep_states:
        stored = (spec.parts, sequences, memories, *shape[2:])
        made |= {f"{n}s": jax.ShapeDtypeStruct(stored, jnp.bfloat16) for n in spec.matrices}
        made |= {n: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for n in ("keys", "values")}
        numbers = (sequences, shape[2], len(spec.vectors) + 1, ROWS)
        made["vectors"] = jax.ShapeDtypeStruct(numbers, jnp.float32)
    inputs = {"x_keys": "keys", "x_values": "values", "queries": "queries"}

    def body(*arguments, **smem):
        names = (*tokens, *starts, *made)
        refs = dict(zip(names, arguments, strict=True))
        arrived, (sequence, _) = smem.pop("arrived"), where()
        on = Warpgroup(spec.parts, bool(spec.interpret))

        def begin(memory, at):
            weights = load(on, refs, spec.matrices, (sequence, memory))
            if keep_states:
                plgpu.wait_smem_to_gmem(0)  # the copies of the memory before
            for name, weight in zip(spec.matrices, weights, strict=True):
                on.put(smem[name], weight)
            return weights

        def write(memory, at, read):
            weights = begin(memory, at)
            if keep_states:
                for name in spec.matrices:
                    send(spec, smem[name], refs[f"{name}s"], (sequence, memory, at))
            weights, found = gpu_forward.step(spec._replace(read=read), smem, weights)
            _store(refs, spec.matrices, (sequence, memory), weights)
            return found

        def one_chunk(at, nothing):
            plgpu.wait_smem_to_gmem(0)
            fetch(spec, refs, smem, (sequence, 0, at), inputs, arrived)
            if spec.momentum:
                rows = smem["vectors"].at[pl.ds(len(VECTORS), 3)]
                plgpu.copy_gmem_to_smem(refs["momentum"].at[sequence, at], rows, arrived)
            begin_document = begins(refs, sequence, at)
            if begin_document is not None:
                pl.when(begin_document)(lambda: copy(FRESH))
            plgpu.barrier_wait(arrived)
            vectors = {name: smem["vectors"].at[i] for i, name in enumerate(spec.vectors)}
            context = _context(spec, on, smem, refs, sequence, partial(begin, at=at), "values")
            generate(context, smem["keys"], smem["values"], vectors)
            plgpu.commit_smem()
            if keep_states:
                for name in ("keys", "values"):
                    send(spec, smem[name], refs[name], (sequence, at))
                plgpu.copy_smem_to_gmem(smem["vectors"], refs["vectors"].at[sequence, at])
            _each(READ, partial(write, at=at, read=None))
            on.put(smem["out"], write(READ, at, spec.read))
            send(spec, smem["out"], refs["reads"], (sequence, at))
            return nothing

        def copy(names):
            def one(memory):
                index = (sequence, memory)
                first = load(on, refs, names, index)
                first = first + (on.full(0.0, ROWS),) * (len(spec.matrices) - len(first))
                _store(refs, spec.matrices, index, first)

            _each(memories, one)

        copy(starts)
        lax.fori_loop(0, shape[2], one_chunk, 0)
        plgpu.wait_smem_to_gmem(0)

    kernel = launch(
        body,
        (sequences, 1),
        [*made.values()],
        scratch(spec, backward=False)
        | {"arrived": plgpu.Barrier(num_arrivals=copies(spec, inputs) + spec.momentum)},
        name="self_modifying_forward",
        interpret=spec.interpret,
    )
    return dict(zip(made, kernel(*tokens.values(), *matrices), strict=True))


def backward(spec: Spec, tokens: dict[str, Any], kept: dict[str, Any], cotangents: Any):
    """Pull cotangents back through `forward`, from the last chunk to the first.

    Args:
      spec: see `Spec`.
      tokens: those of `forward` and of_reads [P, S, N, 64, 64].
      kept: of `forward`: the starts, keys, values and vectors.
      cotangents: of the matrices after the last token, [S, 5, 64, 64], float32.

    Returns:
      A dict of x_keys, x_values and queries (but for the first term of the reads), in parts
      [P, S, N, 64, 64]; of learning rate and decay, in parts, whose sums over tokens are the
      gradients of the readout's weights; gates [S, N, 3, 64], whose sums are those of its biases,
      but the last, which is of the logs of momentum; the matrices; with documents fresh_inner and
      fresh_outer.
    """
    of_inner, lasts = cotangents[0], tuple(f"last_{name}" for name in spec.matrices)
    (sequences, memories), shape = of_inner.shape[:2], tokens["x_keys"].shape
    given = {name: kept[f"{name}s"] for name in spec.matrices} | tokens
    given |= {name: kept[name] for name in ("keys", "values", "vectors")}
    made = {n: jax.ShapeDtypeStruct(of_inner.shape, jnp.float32) for n in spec.matrices}
    if "begins" in tokens:
        made |= {n: made["inner"] for n in FRESH}
    square = jax.ShapeDtypeStruct((sequences, ROWS, ROWS), jnp.float32)
    made |= {"of_keys": square, "of_values": square}  # of the chunk that is being pulled
    for name in ("x_keys", "x_values", "queries", "learning_rate", "decay"):
        made[name] = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    made["gates"] = jax.ShapeDtypeStruct((sequences, shape[2], 3, ROWS), jnp.float32)
    first = {"keys": "keys", "values": "third", "vectors": "vectors"}
    first |= {name: name for name in (*spec.matrices, "queries")} | {"queries": "first"}

    def body(*arguments, **smem):
        count = len(given) + len(lasts)
        refs = dict(zip((*given, *lasts), arguments[:count], strict=True))
        outs = dict(zip(made, arguments[count:], strict=True))
        on, (sequence, _) = Warpgroup(spec.parts, bool(spec.interpret)), where()

        def get(name, tile, memory, at):
            fetch(spec, refs, smem, (sequence, memory, at), {name: tile}, smem["again"])
            plgpu.barrier_wait(smem["again"])

        def out(name, value, tile, at, add):
            if name in ("keys", "values"):
                target = f"of_{name}"
                if add:
                    value = value + on.load(outs[target].at[sequence])
                outs[target][sequence] = value
                return
            on.put(smem[tile], value)
            send(spec, smem[tile], outs[name], (sequence, at))

        def written(memory, at, read):
            plgpu.wait_smem_to_gmem(0)
            fetch(spec, refs, smem, (sequence, memory, at), first, smem["arrived"])
            plgpu.barrier_wait(smem["arrived"])
            step = gpu_backward.Step(
                spec._replace(read=read),
                cell_of(spec, smem, steep="second"),
                smem,
                partial(get, memory=memory, at=at),
                partial(out, at=at, add=read is None),
                {},
            )
            backs = gpu_backward.pull(step, load(on, outs, spec.matrices, (sequence, memory)))
            _store(outs, spec.matrices, (sequence, memory), backs)
            return step.vectors

        def generated(at, vectors):
            get("keys", "third", 0, at)
            get("x_keys", "keys", 0, at)
            get("x_values", "first", 0, at)

            def begin(memory):
                for name in spec.matrices[:2]:
                    get(name, name, memory, at)

            def pull(memory, of_said):
                tile = smem["first" if memory == VALUE else "keys"]
                on.put(smem["second"], of_said)
                matrices, work = (smem["inner"], smem["outer"]), (smem["work0"], smem["work1"])
                *more, of_input = pull_predict(on, tile, matrices, smem["second"], work)
                backs = load(on, outs, spec.matrices[:2], (sequence, memory))
                backs = tuple(a + b for a, b in zip(backs, more, strict=True))
                _store(outs, spec.matrices[:2], (sequence, memory), backs)
                return of_input + on.get(smem["second"])

            def give(name, value, of_logit=None):
                tile = {"learning_rate": "work2", "decay": "work3", "x_keys": "fifth"}.get(
                    name, "fourth"
                )
                if value is not None:
                    out(name, value, tile, at, False)
                if of_logit is not None:
                    index = ("learning_rate", "decay", "momentum").index(name)
                    outs["gates"][sequence, at, index] = of_logit

            numbers = {name: smem["vectors"].at[i] for i, name in enumerate(spec.vectors)}
            context = _context(spec, on, smem, refs, sequence, begin, "first")
            of_keys, of_values = load(on, outs, ("of_keys", "of_values"), sequence)
            of = Cotangents(of_keys, of_values, vectors)
            pull_generate(context, of, smem["third"], numbers, smem["work1"], pull, give)

        def one_chunk(i, nothing):
            at = shape[2] - 1 - i

            def more(memory, vectors):
                new = written(memory, at, None)
                return {n: v + new[n] if n in new else v for n, v in vectors.items()}

            vectors = written(READ, at, spec.read)
            generated(at, lax.fori_loop(0, READ, more, vectors))
            begin = begins(refs, sequence, at)
            if begin is not None:
                pl.when(begin)(lambda: _each(memories, start_document))
            return nothing

        zeros = (on.full(0.0, ROWS),) * len(spec.matrices)

        def start_document(memory):
            index = (sequence, memory)
            both = (spec.matrices[:2], FRESH)
            backs, before = (load(on, outs, names, index) for names in both)
            _store(outs, FRESH, index, (a + b for a, b in zip(backs, before, strict=True)))
            _store(outs, spec.matrices, index, zeros)

        def begin_with(memory):
            index = (sequence, memory)
            _store(outs, spec.matrices, index, load(on, refs, lasts, index))
            if "begins" in tokens:
                _store(outs, FRESH, index, zeros[:2])

        _each(memories, begin_with)
        lax.fori_loop(0, shape[2], one_chunk, 0)
        plgpu.wait_smem_to_gmem(0)

    barriers = {
        "arrived": plgpu.Barrier(num_arrivals=copies(spec, first)),
        "again": plgpu.Barrier(num_arrivals=spec.parts),
    }
    kernel = launch(
        body,
        (sequences, 1),
        [*made.values()],
        scratch(spec, backward=True) | barriers,
        name="self_modifying_backward",
        interpret=spec.interpret,
    )
    return dict(zip(made, kernel(*given.values(), *cotangents), strict=True))
