"""A scan over chunks as one TPU kernel: the state stays in VMEM from the first chunk to the last.

The chunk's function is the same jnp code that runs elsewhere, traced into the kernel. The forward
kernel leaves the state of every k-th chunk's start in memory; the backward kernel takes k chunks at
a time from the last to the first, runs them again from there, keeps their starts in VMEM, and pulls
the cotangents back through one after another. What is stored is one state for k chunks, and nothing
for a token; k > 1 costs one more forward pass and k states of VMEM.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# (constants, state, tokens) -> (state, outputs): trees of arrays, one leading axis of size one
Chunk = Callable[[Any, Any, Any], tuple[Any, Any]]


class Options(NamedTuple):
    """How a kernel is compiled.

    Attributes:
      vmem_limit: bytes of VMEM it may use.
      interpret: run on the CPU, for tests.
      name: of the kernel, in profiles and lowered text.
      save_every: k, chunks between two states that the forward pass stores; divides the chunks.
    """

    vmem_limit: int
    interpret: bool = False
    name: str = "chunk_loop"
    save_every: int = 1


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunk_loop(
    chunk: Chunk, options: Options, constants: Any, state: Any, tokens: Any
) -> tuple[Any, Any]:
    """Run `chunk` over the chunks of a stack of sequences.

    Args:
      chunk: a hashable function of arrays with a leading axis of size one; it captures no arrays.
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


def _of_state(leaf, **options):
    rest = (0,) * (leaf.ndim - 1)
    return pl.BlockSpec((1, *leaf.shape[1:]), lambda s, c: (s, *rest), **options)


def _of_start(leaf):
    """A state that is read once a sequence: waited for, not fetched ahead, to save VMEM."""
    return _of_state(leaf, pipeline_mode=pl.Buffered(1))


def _of_chunks(leaf, order, count=1):
    """A block of `count` chunks of one sequence."""
    rest = (0,) * (leaf.ndim - 2)
    return pl.BlockSpec((1, count, *leaf.shape[2:]), lambda s, c: (s, order(c), *rest))


def _at(refs, tree, k):
    """Chunk k of a block: a tree of [1, ...]."""
    return jax.tree.unflatten(tree, [ref[0, pl.ds(k, 1)] for ref in refs])


def _put(refs, values, k):
    for ref, value in zip(refs, jax.tree.leaves(values), strict=True):
        ref[0, pl.ds(k, 1)] = value


def _repeat(count, body):
    """body(0), body(1), ... of a kernel."""
    if count == 1:
        body(0)
    else:
        jax.lax.fori_loop(0, count, lambda k, _: body(k), None)


def _shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _stacked(leaf, count: int, chunks: int):
    """The shape of what one sequence and chunk give, [1, rows, columns], over all of them."""
    return jax.ShapeDtypeStruct((count, chunks, *leaf.shape[1:]), leaf.dtype)


def _inside(chunk, constants, state, tokens):
    """What a chunk gives, as shapes."""
    one = lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype)  # noqa: E731
    constants, state = jax.tree.map(one, (constants, state))
    tokens = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[2:]), a.dtype), tokens)
    return jax.eval_shape(chunk, constants, state, tokens)


def _all(refs, tree):
    """A tree of [1, ...]."""
    return jax.tree.unflatten(tree, [ref[...] for ref in refs])


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


def _hold(held, values):
    for ref, value in zip(held, jax.tree.leaves(values), strict=True):
        ref[...] = value


def _give(final, held, ends):
    """Give the carried state out after the last block."""

    @pl.when(ends)
    def _():
        for ref, value in zip(final, held, strict=True):
            ref[...] = value[...]


def _blocks(chunks: int, options: Options) -> int:
    if chunks % options.save_every:
        raise ValueError(f"save_every={options.save_every} does not divide {chunks} chunks")
    return chunks // options.save_every


def _forward(chunk, options, constants, state, tokens, *, keep: bool):
    fixed, fixed_tree = jax.tree.flatten(constants)
    leaves, tree = jax.tree.flatten(state)
    given, token_tree = jax.tree.flatten(tokens)
    count, chunks = given[0].shape[:2]
    after, outputs = _inside(chunk, constants, state, tokens)
    assert [a.shape[1:] for a in jax.tree.leaves(after)] == [a.shape[1:] for a in leaves]
    made, out_tree = jax.tree.flatten(outputs)
    out_shapes = [_stacked(a, count, chunks) for a in made]
    every, blocks = options.save_every, _blocks(chunks, options)
    kept = [jax.ShapeDtypeStruct((count, blocks, *a.shape[1:]), a.dtype) for a in leaves]
    order = lambda c: c  # noqa: E731

    def kernel(*arguments):
        refs = list(arguments)
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        fixed_refs, first, token_refs = take(len(fixed)), take(len(leaves)), take(len(given))
        final_refs, out_refs = take(len(leaves)), take(len(made))
        start_refs, held = take(len(kept) if keep else 0), refs
        at = pl.program_id(1)

        def body(k):
            tokens = _at(token_refs, token_tree, k)
            new, out = chunk(_all(fixed_refs, fixed_tree), _all(held, tree), tokens)
            _put(out_refs, out, k)
            _hold(held, new)

        _load(held, first, at == 0)
        for ref, value in zip(start_refs, held, strict=False):
            ref[0] = value[...]
        _repeat(every, body)
        _give(final_refs, held, at == blocks - 1)

    shapes = [*map(_shape, leaves), *out_shapes, *(kept if keep else [])]
    specs = [_of_state(a) for a in leaves]
    specs += [_of_chunks(a, order, every) for a in out_shapes]
    specs += [_of_chunks(a, order) for a in (kept if keep else [])]
    found = pl.pallas_call(
        kernel,
        grid=(count, blocks),
        in_specs=[
            *map(_of_start, fixed),
            *map(_of_start, leaves),
            *(_of_chunks(a, order, every) for a in given),
        ],
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((1, *a.shape[1:]), a.dtype) for a in leaves],
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
    blocks = _blocks(given[0].shape[1], options)
    order = lambda c: blocks - 1 - c  # noqa: E731

    def kernel(*arguments):
        refs = list(arguments)
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        fixed_refs, start_refs, token_refs = take(len(fixed)), take(len(leaves)), take(len(given))
        end_refs, of_out = take(len(ends)), take(len(outs))
        of_fixed, first_refs, of_tokens = take(len(fixed)), take(len(ends)), take(len(given))
        sums, held = take(len(fixed)), take(len(ends))
        states = refs or start_refs  # the starts of the block's chunks, [1, every, ...]
        at = pl.program_id(1)

        def inputs(k):
            state, tokens = _at(states, tree, k), _at(token_refs, token_tree, k)
            return _all(fixed_refs, fixed_tree), state, tokens

        def again(k):
            _put(states, chunk(*inputs(k))[0], k + 1)

        def back(step):
            k = every - 1 - step
            _, pull = jax.vjp(chunk, *inputs(k))
            of_constants, of_state, found = pull((_all(held, tree), _at(of_out, out_tree, k)))
            _put(of_tokens, found, k)
            for ref, value in zip(sums, jax.tree.leaves(of_constants), strict=True):
                ref[...] += value
            _hold(held, of_state)

        _load(held, end_refs, at == 0)
        _clear(sums, at == 0)
        if every > 1:
            _put(states, _at(start_refs, tree, 0), 0)
            _repeat(every - 1, again)
        _repeat(every, back)
        _give(first_refs, held, at == blocks - 1)
        _give(of_fixed, sums, at == blocks - 1)

    def scratch(leading, of=ends):
        return [pltpu.VMEM((*leading, *a.shape[1:]), a.dtype) for a in of]

    found = pl.pallas_call(
        kernel,
        grid=(count, blocks),
        in_specs=[
            *map(_of_start, fixed),
            *(_of_chunks(a, order) for a in leaves),
            *(_of_chunks(a, order, every) for a in given),
            *map(_of_start, ends),
            *(_of_chunks(a, order, every) for a in outs),
        ],
        out_specs=[
            *map(_of_state, [*fixed, *ends]),
            *(_of_chunks(a, order, every) for a in given),
        ],
        out_shape=[*map(_shape, [*fixed, *ends, *given])],
        scratch_shapes=[
            *scratch((1,), fixed),
            *scratch((1,)),
            *(scratch((1, every)) if every > 1 else []),
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
