"""The backward pass of `gpu_forward`, as one Mosaic GPU kernel.

A block goes through its sequence's chunks from the last to the first with the cotangent of the
memory in registers. It takes k chunks at a time: runs them again from the stored state, leaves
their starts in shared memory, and pulls the cotangents back through one after another.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._gpu.tiles import ROWS, Warpgroup, launch, where
from pallas_kernels.delta_rule.gpu_chunk import GRADIENTS, Carried, advance, pull, solve
from pallas_kernels.delta_rule.gpu_forward import (
    Sizes,
    Spec,
    chunk_of,
    copies,
    fetch_chunk,
    given_dtype,
    scratch,
    sizes_of,
)


def _pull_outputs(spec: Spec, sizes: Sizes):
    """Shapes of the gradients; what all rows of a memory share has one for each block of rows."""
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
            work = smem["work"].at[0], smem["work"].at[1]
            total = solve(chunk, smem["states"].at[j], work)
            weight = advance(chunk, weight, total, work[0])
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
            work = tuple(smem["work"].at[i] for i in range(4))
            held = Carried(smem["states"].at[j], smem["back"], work)
            back = pull(chunk, held, back, give)
            for i, name in enumerate(GRADIENTS):
                if name in vectors:
                    outs["vectors"][row_block, sequence, at, i] = vectors[name]
            return back

        def block(i, back):
            first = (blocks - 1 - i) * every
            plgpu.commit_smem()  # as in `fetch_chunk`
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
        "again": plgpu.Barrier(
            num_arrivals=copies(spec, ("x", "error", "vectors")), num_barriers=1
        ),
        "begun": plgpu.Barrier(num_arrivals=parts, num_barriers=1),
    }
    kernel = launch(
        body,
        (sizes.sequences, sizes.m // ROWS),
        [*made.values()],
        {**held, **barriers},
        name="delta_rule_backward",
        interpret=spec.interpret,
    )
    of_final = of_final.reshape(made["start"].shape)
    found = dict(zip(made, kernel(*(tokens[n] for n in names), starts, of_final), strict=True))
    found["start"] = found["start"].reshape(sizes.sequences, sizes.m, sizes.n)
    return found


def _give(spec, vectors, outs, smem, here, name, value):
    """Write a matrix of gradients out at once, since registers are scarce; add up vectors.

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
