"""A scan over chunks as one TPU kernel: the state stays in VMEM from the first chunk to the last.

The chunk's function is the same jnp code that runs elsewhere, traced into the kernel. The forward
kernel leaves the state of every k-th chunk's start in memory; the backward kernel takes k chunks at
a time from the last to the first, runs them again from there, and pulls the cotangents back through
one after another. What is stored is one state for k chunks, and nothing for a token. Of the second
run the kernel keeps in VMEM either what the pullbacks need, or only the chunks' starts, and then
runs each chunk a third time.

What a kernel carries from chunk to chunk lies in the block of its last result, which stays resident
over all chunks of a sequence: it costs no memory of its own and is written out once. A grid step
takes several sequences, whose instructions alternate: while a product of one is in flight, those of
the others are issued.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._tpu.lockstep import Window, lockstep, value_of
from pallas_kernels._tpu.pullback import split_pullback

# (constants, state, tokens) -> (state, outputs): trees of arrays, one leading axis of size one
Chunk = Callable[[Any, Any, Any], tuple[Any, Any]]


class Options(NamedTuple):
    """How a kernel is compiled.

    Attributes:
      vmem_limit: bytes of VMEM it may use.
      interpret: run on the CPU, for tests.
      name: of the kernel, in profiles and lowered text.
      save_every: k, chunks between two states that the forward pass stores; divides the number of
        chunks.
      sequences: how many a grid step takes, forward and backward; the last step takes the rest.
      residuals: whether what the pullbacks of k chunks need is kept in VMEM; if not, each chunk
        runs once more.
    """

    vmem_limit: int
    interpret: bool = False
    name: str = "chunk_loop"
    save_every: int = 1
    sequences: tuple[int, int] = (1, 1)
    residuals: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunk_loop(
    chunk: Chunk, options: Options, constants: Any, state: Any, tokens: Any
) -> tuple[Any, Any]:
    """Run `chunk` over the chunks of a stack of sequences.

    Args:
      chunk: a hashable function of arrays with a leading axis of size one; it closes over none.
      options: see `Options`.
      constants: a tree of [S, ..., m, n], the same for every chunk of a sequence; None for none.
      state: a tree of [S, ..., m, n] at the start.
      tokens: a tree of [S, N, rows, C], N chunks of C tokens.

    Returns:
      The state after the last chunk, and the outputs, a tree of [S, N, rows, C].
    """
    state, outputs, _ = _forward(chunk, options, constants, state, tokens, keep=False)
    return state, outputs


def _loop_fwd(chunk, options, constants, state, tokens):
    final, outputs, starts = _forward(chunk, options, constants, state, tokens, keep=True)
    return (final, outputs), (constants, starts, tokens)


class _Blocks(NamedTuple):
    """The blocks of a grid of sequences and chunks."""

    sequences: int
    order: Callable[[Any], Any] = lambda c: c

    def of_state(self, leaf, **options):
        rest = (0,) * (leaf.ndim - 1)
        shape = (self.sequences, *leaf.shape[1:])
        return pl.BlockSpec(shape, lambda s, c: (s, *rest), **options)

    def of_start(self, leaf):
        """A state that is read once a sequence: one buffer, not two, to save VMEM."""
        return self.of_state(leaf, pipeline_mode=pl.Buffered(1))

    def of_chunks(self, leaf, count=1):
        """A block of `count` chunks of each sequence."""
        rest = (0,) * (leaf.ndim - 2)
        shape = (self.sequences, count, *leaf.shape[2:])
        return pl.BlockSpec(shape, lambda s, c: (s, self.order(c), *rest))


def _all(refs, s):
    """Sequence s of a block: windows of [1, ...]."""
    return [Window(ref, slice(s, s + 1)) for ref in refs]


def _at(refs, s, k):
    """Chunk k of sequence s of a block: windows of [1, ...]."""
    return [Window(ref, (slice(s, s + 1), k)) for ref in refs]


def _hold(refs, values, s):
    """Write what is carried, after everything that reads it."""
    for ref, value in zip(refs, jax.tree.leaves(values, is_leaf=_is_window), strict=True):
        ref[s : s + 1] = value_of(value)


def _is_window(value):
    return isinstance(value, Window)


def _repeat(count, body):
    """body(0), body(1), ... of a kernel."""
    if count == 1:
        body(0)
    else:
        jax.lax.fori_loop(0, count, lambda k, _: body(k), None)


def _stacked(leaf, count: int, chunks: int):
    """The shape of what one sequence and chunk give, [1, rows, columns], over all of them."""
    return jax.ShapeDtypeStruct((count, chunks, *leaf.shape[1:]), leaf.dtype)


def _of_chunk(leaf):
    return jax.ShapeDtypeStruct((1, *leaf.shape[2:]), leaf.dtype)


def arguments_of_one(constants, state, tokens):
    """The shapes of what a chunk of one sequence is given."""
    one = lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype)  # noqa: E731
    constants, state = jax.tree.map(one, (constants, state))
    return constants, state, jax.tree.map(_of_chunk, tokens)


def _shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _load(held, given, begins):
    """Take the carried state from memory at the first block of a sequence."""

    @pl.when(begins)
    def _():
        for ref, value in zip(held, given, strict=True):
            ref[...] = value[...]


def _clear(sums, begins):
    """Start sums at zero at the first block of a sequence."""

    @pl.when(begins)
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)


def _blocks(chunks: int, options: Options) -> int:
    if chunks % options.save_every:
        raise ValueError(f"save_every={options.save_every} does not divide {chunks} chunks")
    return chunks // options.save_every


def _forward(chunk, options, constants, state, tokens, *, keep: bool):
    fixed, fixed_tree = jax.tree.flatten(constants)
    leaves, tree = jax.tree.flatten(state)
    given, token_tree = jax.tree.flatten(tokens)
    count, chunks = given[0].shape[:2]
    after, outputs = jax.eval_shape(chunk, *arguments_of_one(constants, state, tokens))
    assert [a.shape[1:] for a in jax.tree.leaves(after)] == [a.shape[1:] for a in leaves]
    made, out_tree = jax.tree.flatten(outputs)
    out_shapes = [_stacked(a, count, chunks) for a in made]
    every, blocks = options.save_every, _blocks(chunks, options)
    kept = [jax.ShapeDtypeStruct((count, blocks, *a.shape[1:]), a.dtype) for a in leaves]
    kept = kept if keep else []
    sequences = min(options.sequences[0], count)
    each, shapes = range(sequences), arguments_of_one(constants, state, tokens)

    def kernel(*arguments):
        refs = list(arguments)
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        fixed_refs, first, token_refs = take(len(fixed)), take(len(leaves)), take(len(given))
        held, out_refs, start_refs = take(len(leaves)), take(len(made)), refs

        def body(k):
            inputs = [[*_all(fixed_refs, s), *_all(held, s), *_at(token_refs, s, k)] for s in each]
            kept = [[None] * len(held) + _at(out_refs, s, k) for s in each]
            for s, (new, _) in enumerate(lockstep(chunk, shapes, inputs, kept)):
                _hold(held, new, s)

        _load(held, first, pl.program_id(1) == 0)
        for ref, value in zip(start_refs, held, strict=False):
            ref[:, 0] = value[...]
        _repeat(every, body)

    specs = _Blocks(sequences)
    found = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, sequences), blocks),
        in_specs=[
            *map(specs.of_start, [*fixed, *leaves]),
            *(specs.of_chunks(a, every) for a in given),
        ],
        out_specs=[
            *map(specs.of_state, leaves),
            *(specs.of_chunks(a, every) for a in out_shapes),
            *map(specs.of_chunks, kept),
        ],
        out_shape=[*map(_shape, leaves), *out_shapes, *kept],
        compiler_params=_compiler(options),
        interpret=options.interpret,
        name=f"{options.name}_forward",
    )(*fixed, *leaves, *given)
    n, m = len(leaves), len(leaves) + len(made)
    return (
        jax.tree.unflatten(tree, found[:n]),
        jax.tree.unflatten(out_tree, found[n:m]),
        jax.tree.unflatten(tree, found[m:]) if keep else None,
    )


def _compiler(options: Options):
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=options.vmem_limit
    )


def _loop_bwd(chunk, options, residuals, cotangents):
    constants, starts, tokens = residuals
    of_final, of_outputs = cotangents
    fixed, fixed_tree = jax.tree.flatten(constants)
    leaves, tree = jax.tree.flatten(starts)
    given, token_tree = jax.tree.flatten(tokens)
    ends, _ = jax.tree.flatten(of_final)
    outs, out_tree = jax.tree.flatten(of_outputs)
    count, every = given[0].shape[0], options.save_every
    blocks, sequences = _blocks(given[0].shape[1], options), min(options.sequences[1], count)
    shapes, split = arguments_of_one(constants, of_final, tokens), None
    if options.residuals and every > 1:
        split = split_pullback(chunk, shapes)
    each = range(sequences)

    def kernel(*arguments):
        refs = list(arguments)
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        fixed_refs, start_refs, token_refs = take(len(fixed)), take(len(leaves)), take(len(given))
        end_refs, of_out = take(len(ends)), take(len(outs))
        sums, held, of_tokens = take(len(fixed)), take(len(ends)), take(len(given))
        states = take(len(leaves)) if every > 1 else start_refs  # where a chunk's start is read
        kept = refs
        begins = pl.program_id(1) == 0

        def inputs(s, k):
            return [*_all(fixed_refs, s), *_at(states, s, k), *_at(token_refs, s, k)]

        def again(k):
            given, new = [inputs(s, k) for s in each], [_at(states, s, k + 1) for s in each]
            lockstep(lambda *x: chunk(*x)[0], shapes, given, new)

        def again_and_keep(k):
            given = [inputs(s, k) for s in each]
            new = [_at(states, s, k + 1) + [Window(ref, (s, k)) for ref in kept] for s in each]
            assert split is not None
            lockstep(split.run, shapes, given, new)

        def pulled(inputs, kept, cotangents):
            if split:
                return split.back(inputs, kept, cotangents)
            return jax.vjp(chunk, *inputs)[1](cotangents)

        def back(step):
            k = every - 1 - step
            given, places = [], []
            for s in each:
                values = [Window(ref, (s, k)) for ref in kept]
                given.append([*inputs(s, k), *values, *_all(held, s), *_at(of_out, s, k)])
                places.append([None] * len([*sums, *held]) + _at(of_tokens, s, k))
            of_out_shapes = jax.tree.map(lambda a: _of_chunk(a), of_outputs)
            arguments = (shapes, split.kept if split else [], (shapes[1], of_out_shapes))
            found = lockstep(pulled, arguments, given, places)
            for s, (of_constants, of_state, _) in enumerate(found):
                of_constants = jax.tree.leaves(of_constants, is_leaf=_is_window)
                for ref, value in zip(sums, of_constants, strict=True):
                    ref[s : s + 1] += value_of(value)
                _hold(held, of_state, s)

        _load(held, end_refs, begins)
        _clear(sums, begins)
        for ref, start in zip(states if every > 1 else [], start_refs, strict=False):
            ref[:, 0] = start[:, 0]
        if every > 1:
            _repeat(every if split else every - 1, again_and_keep if split else again)
        _repeat(every, back)

    lead = (sequences, every + 1 if split else every)  # with the pullback, the last one's end, too
    specs = _Blocks(sequences, lambda c: blocks - 1 - c)
    found = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, sequences), blocks),
        in_specs=[
            *map(specs.of_start, fixed),
            *map(specs.of_chunks, leaves),
            *(specs.of_chunks(a, every) for a in given),
            *map(specs.of_start, ends),
            *(specs.of_chunks(a, every) for a in outs),
        ],
        out_specs=[
            *map(specs.of_state, [*fixed, *ends]),
            *(specs.of_chunks(a, every) for a in given),
        ],
        out_shape=[*map(_shape, [*fixed, *ends, *given])],
        scratch_shapes=[
            *(pltpu.VMEM((*lead, *a.shape[1:]), a.dtype) for a in (ends if every > 1 else [])),
            *(
                pltpu.VMEM((sequences, every, *a.shape), a.dtype)
                for a in (split.kept if split else [])
            ),
        ],
        compiler_params=_compiler(options),
        interpret=options.interpret,
        name=f"{options.name}_backward",
    )(*fixed, *leaves, *given, *ends, *outs)
    n, m = len(fixed), len(fixed) + len(ends)
    return (
        jax.tree.unflatten(fixed_tree, found[:n]),
        jax.tree.unflatten(tree, found[n:m]),
        jax.tree.unflatten(token_tree, found[m:]),
    )


chunk_loop.defvjp(_loop_fwd, _loop_bwd)
