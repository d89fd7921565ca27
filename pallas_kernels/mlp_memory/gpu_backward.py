"""The backward pass of `gpu_forward`, as one Mosaic GPU kernel.

A block goes through its memory's chunks from the last to the first with the cotangents of V and U
in registers; it runs each chunk again from the stored start, then pulls back through the outer
delta rule, the inner one and the errors of both. Shared memory is scarce: tiles are reused, and
tokens are copied again where they are needed again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._gpu.tiles import ROWS, Warpgroup, launch, where
from pallas_kernels.delta_rule.gpu_chunk import Carried
from pallas_kernels.mlp_memory.gpu_cell import (
    Cell,
    Norms,
    Pulled,
    clip_of,
    gelu,
    gelu_and_slope,
    pull_clip,
    pull_erase,
    pull_predict,
    pull_write,
)
from pallas_kernels.mlp_memory.gpu_forward import (
    FRESH,
    Spec,
    begins,
    cell_of,
    copies,
    fetch,
    load,
    scratch,
    send,
)


class Step(NamedTuple):
    """One chunk of one memory, backward.

    Attributes:
      spec: see `Spec`.
      cell: with its tiles.
      smem: all of shared memory by name.
      get: `get(name, tile)` copies a matrix of global memory into a tile and waits for it.
      out: `out(name, value, tile)` takes the gradient of a matrix, and may use a tile of that name.
      vectors: gradients so far, by name; added up.
    """

    spec: Spec
    cell: Cell
    smem: Any
    get: Any
    out: Any
    vectors: dict[str, Any]

    def give(self, name, value):
        """Add a gradient of `VECTORS`."""
        self.vectors[name] = self.vectors[name] + value if name in self.vectors else value


def backward(spec: Spec, tokens: dict[str, Any], starts: Any, cotangents: Any) -> dict[str, Any]:
    """Pull cotangents back through `forward`, from the last chunk to the first.

    Args:
      spec: see `Spec`.
      tokens: those of `forward` and, where there are reads, of_reads [P, S, N, 64, 64].
      starts: those of `forward`, of each of `spec.matrices`.
      cotangents: of the matrices after the last token, [S, M, 64, 64], float32.

    Returns:
      A dict of keys, values, queries [P, S, M, N, 64, 64], in parts, and vectors [S, M, N, G, 64]
      (see `Spec.gradients`), to be summed over the M memories, and the matrices, by name. The read
      M(q) = q + ... is pulled back but for its first term. With documents fresh_inner and
      fresh_outer, too.
    """
    of_inner, names = cotangents[0], spec.matrices
    (sequences, memories), chunks = of_inner.shape[:2], tokens["vectors"].shape[1]
    given = dict(zip(names, starts, strict=True)) | tokens
    lasts = tuple(f"last_{name}" for name in names)
    shape = (sequences, memories, chunks)
    made = {n: jax.ShapeDtypeStruct(of_inner.shape, jnp.float32) for n in names}
    if "begins" in tokens:
        made |= {n: made["inner"] for n in FRESH}
    made["vectors"] = jax.ShapeDtypeStruct((*shape, len(spec.gradients), ROWS), jnp.float32)
    for name in ("keys", "values", *(("queries",) if spec.read else ())):
        made[name] = jax.ShapeDtypeStruct((spec.parts, *shape, ROWS, ROWS), jnp.bfloat16)
    running = spec.read not in (None, "anchor")
    first = {"keys": "keys", "values": "third", "vectors": "vectors"}
    first |= {name: name for name in names} | ({"queries": "first"} if running else {})

    def body(*arguments, **smem):
        count = len(given) + len(lasts)
        refs = dict(zip((*given, *lasts), arguments[:count], strict=True))
        outs = dict(zip(made, arguments[count:], strict=True))
        sequence, memory = where()
        on = Warpgroup(spec.parts, bool(spec.interpret))

        def step(i, backs):
            at = chunks - 1 - i
            here = (sequence, memory, at)

            def get(name, tile):
                fetch(spec, refs, smem, here, {name: tile}, smem["again"])
                plgpu.barrier_wait(smem["again"])

            plgpu.wait_smem_to_gmem(0)  # the gradients of the chunk before
            fetch(spec, refs, smem, here, first, smem["arrived"])
            plgpu.barrier_wait(smem["arrived"])
            cell = cell_of(spec, smem, steep="second")

            def out(name, value, tile):
                on.put(smem[tile], value)
                send(spec, smem[tile], outs[name], here)

            chunk = Step(spec, cell, smem, get, out, {})
            backs = pull(chunk, backs)
            for j, name in enumerate(spec.gradients):
                zero = 0.0 * chunk.vectors["learning_rate"]
                outs["vectors"][sequence, memory, at, j] = chunk.vectors.get(name, zero)
            return before_start(on, refs, outs, (sequence, memory), at, backs)

        for name in FRESH:
            if name in outs:
                outs[name][sequence, memory] = on.full(0.0, ROWS)
        last = load(on, refs, lasts, (sequence, memory))
        backs = lax.fori_loop(0, chunks, step, last)
        for name, back in zip(names, backs, strict=True):
            outs[name][sequence, memory] = back
        plgpu.wait_smem_to_gmem(0)

    barriers = {
        "arrived": plgpu.Barrier(num_arrivals=copies(spec, first)),
        "again": plgpu.Barrier(num_arrivals=spec.parts),
    }
    kernel = launch(
        body,
        (sequences, memories),
        [*made.values()],
        scratch(spec, backward=True) | barriers,
        name="mlp_memory_backward",
        interpret=spec.interpret,
    )
    return dict(zip(made, kernel(*given.values(), *cotangents), strict=True))


def before_start(on: Warpgroup, refs, outs, index, at, backs):
    """The cotangents of the matrices before a chunk, which may be the first of a document."""
    begin = begins(refs, index[0], at)
    if begin is None:
        return backs

    @pl.when(begin)
    def _():
        for name, back in zip(FRESH, backs[:2], strict=True):
            outs[name][index] = on.load(outs[name].at[index]) + back

    zeros = (on.full(0.0, ROWS),) * len(backs)
    return lax.cond(begin, lambda: zeros, lambda: backs)


def pull(step: Step, backs):
    """One chunk backward: gives its tokens' gradients, returns those of the matrices before it.

    Tiles: "first" holds the queries, H, the queries again, at last the values; "second" G, the
    cotangent of the reads, G again and its cotangent; "third" the values, s(V q), the cotangent of
    V and that of the keys; "fourth" that of U and that of H; "fifth" s'(V q), the cotangent of V q
    and the keys' gradient on its way out.
    """
    spec, cell, smem = step.spec, step.cell, step.smem
    on, delta, (of_inner, of_outer) = cell.on, spec.delta, spec.each(backs)
    states = spec.each(smem[name] for name in spec.matrices)
    work = tuple(smem[f"work{i}"] for i in range(7) if f"work{i}" in smem)
    carried = lambda state, tile: Carried(  # noqa: E731
        state, (smem[tile], smem["sixth"]) if spec.momentum else smem[tile], work
    )
    norms = cell.write(smem["third"], work[2])
    inner, outer = cell.chunks(norms, smem["first"], read=spec.read)
    if inner.read:
        inner = inner._replace(queries=smem["first"])
        total = delta.solve(inner, states[0], work)
        seen, slope = gelu_and_slope(delta.read(inner, states[0], total, work[1]))
        on.put(smem["third"], seen)
        on.put(smem["fifth"], slope)
        step.get("of_reads", "second")
        outer = outer._replace(queries=smem["third"], of_reads=smem["second"])
    on.put(smem["first"], gelu(cell.before()))
    held = carried(states[1], "fourth")
    of_outer = delta.pull(outer, held, of_outer, _outer_gradients(step, norms))
    if inner.read:
        step.get("queries", "first")
        cell.fill_steep()
        inner = inner._replace(of_reads=smem["fifth"])
    held = carried(states[0], "third")
    of_inner = delta.pull(inner, held, of_inner, _inner_gradients(step, norms))
    of_inner, of_outer, *rest = spec.together(of_inner, of_outer)
    if spec.read == "anchor":
        of_inner, of_outer = _pull_anchor(step, of_inner, of_outer, work)
    if cell.rule.values == "self":
        step.get("values", "first")
    of = Pulled(smem["of_error"], cell.steep, smem["fourth"], smem["third"])

    def give(name, value):
        target = {"keys": "fifth", "values": "work0"}[name]
        step.out(name, value, target)

    both = pull_write(cell, norms, of, (of_inner, of_outer), smem["first"], work, give)
    return (*both, *rest)


def _pull_anchor(step: Step, of_inner, of_outer, work):
    """The cotangents of V and U through reads at the chunk's start; gives that of the queries."""
    cell, smem = step.cell, step.smem
    step.get("queries", "first")
    step.get("of_reads", "fifth")
    more = pull_predict(
        cell.on, smem["first"], (cell.inner, cell.outer), smem["fifth"], (work[0], work[1])
    )
    step.out("queries", more[2], "work2")
    plgpu.wait_smem_to_gmem(0)
    return of_inner + more[0], of_outer + more[1]


def _outer_gradients(step: Step, norms: Norms):
    """What takes the gradients of U's delta rule: those of E, of H and of V q go into tiles."""
    cell, smem = step.cell, step.smem
    of: dict[str, Any] = {}
    on, rule, eta = cell.on, cell.rule, cell.vectors["learning_rate"]

    def give(name, value):
        if name in ("learning_rate", "erase"):
            of[name] = of[name] + value if name in of else value
        elif name == "queries":  # of s(V q)
            on.put(smem["fifth"], value * on.get(smem["fifth"]))
        elif name == "error":
            of_error, of["hidden"] = _pull_eta(step, of["learning_rate"], norms.error, norms.hidden)
            on.put(smem["of_error"], _with_norm(cell, value, of_error, cell.error))
        elif name == "x":
            if "erase" in of:
                of_eta, of_hidden = pull_erase(on.vector(eta), norms.hidden, rule, of["erase"])
                step.give("learning_rate", of_eta)
                of["hidden"] = of_hidden if of["hidden"] is None else of["hidden"] + of_hidden
            on.put(smem["fourth"], _with_norm(cell, value, of["hidden"], smem["first"]))
        else:
            step.give(name, value)

    return give


def _inner_gradients(step: Step, norms: Norms):
    """What takes the gradients of V's delta rule: those of G and of K go into tiles."""
    cell, smem = step.cell, step.smem
    of: dict[str, Any] = {}
    on = cell.on

    def give(name, value):
        if name == "learning_rate":
            of[name] = value
        elif name == "queries":
            step.out("queries", value, "work3")
            plgpu.wait_smem_to_gmem(0)
        elif name == "error":
            size = on.vector(cell.vectors["size"])
            of_error, of_size = _pull_eta(step, of["learning_rate"], norms.steep, size)
            if of_size is not None:
                step.give("size", of_size)
            on.put(cell.steep, _with_norm(cell, value, of_error, cell.steep))
        elif name == "x":
            on.put(smem["third"], value)
        else:
            step.give(name, value)

    return give


def _pull_eta(step: Step, of_eta, error, of_input):
    """Through a learning rate that squared norms clip: gives its cotangent, returns theirs."""
    cell = step.cell
    clip = clip_of(error * of_input, cell.rule)
    if clip is None:
        step.give("learning_rate", of_eta)
        return None, None
    step.give("learning_rate", clip * of_eta)
    of_clip = cell.on.vector(cell.vectors["learning_rate"]) * of_eta
    of_product = pull_clip(error * of_input, cell.rule, of_clip)
    return of_product * of_input, of_product * error


def _with_norm(cell: Cell, value, of_norm, tile):
    """A cotangent with that of the squared norms of the rows of a tile."""
    if of_norm is None:
        return value
    return value + cell.scaled(2.0 * of_norm, cell.on.get(tile))
