"""A scan over chunks as one TPU kernel: the state stays in VMEM from the first chunk to the last.

The chunk's function is the same jnp code that runs elsewhere, traced into the kernel. The forward
kernel leaves the state of every chunk's start in memory; the backward kernel walks the chunks from
the last to the first, runs each again from its start and pulls the cotangents back, all in VMEM.
What is stored is one state a chunk, and nothing a token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# (state, tokens) -> (state, outputs): trees of arrays with one leading axis of size one
Chunk = Callable[[Any, Any], tuple[Any, Any]]


class Options(NamedTuple):
    """How a kernel is compiled.

    Attributes:
      vmem_limit: bytes of VMEM it may use.
      interpret: run on the CPU, for tests.
      name: of the kernel, in profiles and lowered text.
    """

    vmem_limit: int
    interpret: bool = False
    name: str = "chunk_loop"


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunk_loop(chunk: Chunk, options: Options, state: Any, tokens: Any) -> tuple[Any, Any]:
    """Run `chunk` over the chunks of a stack of sequences.

    Args:
      chunk: a hashable function of arrays with a leading axis of size one; it captures no arrays.
      options: see `Options`.
      state: a tree of [S, ..., m, n] at the start.
      tokens: a tree of [S, N, rows, C], N chunks of C tokens.

    Returns:
      The state after the last chunk, and the outputs, a tree of [S, N, rows, C].
    """
    state, outputs, _ = _forward(chunk, options, state, tokens, keep=False)
    return state, outputs


def _loop_fwd(chunk, options, state, tokens):
    final, outputs, starts = _forward(chunk, options, state, tokens, keep=True)
    return (final, outputs), (starts, tokens)


def _of_state(leaf):
    rest = (0,) * (leaf.ndim - 1)
    return pl.BlockSpec((1, *leaf.shape[1:]), lambda s, c: (s, *rest))


def _of_chunk(leaf, order):
    rest = (0,) * (leaf.ndim - 2)
    return pl.BlockSpec((1, 1, *leaf.shape[2:]), lambda s, c: (s, order(c), *rest))


def _shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _stacked(leaf, count: int, chunks: int):
    """The shape of what one sequence and chunk give, [1, rows, columns], over all of them."""
    return jax.ShapeDtypeStruct((count, chunks, *leaf.shape[1:]), leaf.dtype)


def _inside(chunk, state, tokens):
    """What a chunk gives, as shapes."""
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), state)
    tokens = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[2:]), a.dtype), tokens)
    return jax.eval_shape(chunk, state, tokens)


def _load(held, given, begins):
    """Take the carried state from memory at the first chunk of a sequence."""

    @pl.when(begins)
    def _():
        for ref, value in zip(held, given, strict=True):
            ref[...] = value[...]


def _store(held, final, values, ends):
    """Hold the carried state for the next chunk; give it out after the last one."""
    for ref, value in zip(held, values, strict=True):
        ref[...] = value

    @pl.when(ends)
    def _():
        for ref, value in zip(final, values, strict=True):
            ref[...] = value


def _forward(chunk, options, state, tokens, *, keep: bool):
    leaves, tree = jax.tree.flatten(state)
    given, token_tree = jax.tree.flatten(tokens)
    count, chunks = given[0].shape[:2]
    after, outputs = _inside(chunk, state, tokens)
    assert [a.shape[1:] for a in jax.tree.leaves(after)] == [a.shape[1:] for a in leaves]
    made, out_tree = jax.tree.flatten(outputs)
    out_shapes = [_stacked(a, count, chunks) for a in made]
    kept = [jax.ShapeDtypeStruct((count, chunks, *a.shape[1:]), a.dtype) for a in leaves]
    order = lambda c: c  # noqa: E731

    def kernel(*arguments):
        refs = list(arguments)
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        first, token_refs = take(len(leaves)), take(len(given))
        final_refs, out_refs = take(len(leaves)), take(len(made))
        start_refs, held = take(len(kept) if keep else 0), refs
        at = pl.program_id(1)

        _load(held, first, at == 0)
        now = [ref[...] for ref in held]
        for ref, value in zip(start_refs, now, strict=False):
            ref[0] = value
        new, out = chunk(
            jax.tree.unflatten(tree, now),
            jax.tree.unflatten(token_tree, [ref[0] for ref in token_refs]),
        )
        for ref, value in zip(out_refs, jax.tree.leaves(out), strict=True):
            ref[0] = value
        _store(held, final_refs, jax.tree.leaves(new), at == chunks - 1)

    shapes = [*map(_shape, leaves), *out_shapes, *(kept if keep else [])]
    specs = [_of_state(a) for a in leaves]
    specs += [_of_chunk(a, order) for a in [*out_shapes, *(kept if keep else [])]]
    found = pl.pallas_call(
        kernel,
        grid=(count, chunks),
        in_specs=[*map(_of_state, leaves), *(_of_chunk(a, order) for a in given)],
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((1, *a.shape[1:]), a.dtype) for a in leaves],
        compiler_params=_compiler(options),
        interpret=options.interpret,
        name=f"{options.name}_forward",
    )(*leaves, *given)
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
    starts, tokens = residuals
    of_final, of_outputs = cotangents
    leaves, tree = jax.tree.flatten(starts)
    given, token_tree = jax.tree.flatten(tokens)
    ends, _ = jax.tree.flatten(of_final)
    outs, out_tree = jax.tree.flatten(of_outputs)
    count, chunks = given[0].shape[:2]
    order = lambda c: chunks - 1 - c  # noqa: E731

    def kernel(*arguments):
        refs = list(arguments)
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        start_refs, token_refs = take(len(leaves)), take(len(given))
        end_refs, of_out = take(len(ends)), take(len(outs))
        first_refs, of_tokens, held = take(len(ends)), take(len(given)), refs
        at = pl.program_id(1)

        _load(held, end_refs, at == 0)
        _, pull = jax.vjp(
            chunk,
            jax.tree.unflatten(tree, [ref[0] for ref in start_refs]),
            jax.tree.unflatten(token_tree, [ref[0] for ref in token_refs]),
        )
        of_new = jax.tree.unflatten(tree, [ref[...] for ref in held])
        of_state, found = pull((of_new, jax.tree.unflatten(out_tree, [ref[0] for ref in of_out])))
        for ref, value in zip(of_tokens, jax.tree.leaves(found), strict=True):
            ref[0] = value
        _store(held, first_refs, jax.tree.leaves(of_state), at == chunks - 1)

    found = pl.pallas_call(
        kernel,
        grid=(count, chunks),
        in_specs=[
            *(_of_chunk(a, order) for a in (*leaves, *given)),
            *map(_of_state, ends),
            *(_of_chunk(a, order) for a in outs),
        ],
        out_specs=[*map(_of_state, ends), *(_of_chunk(a, order) for a in given)],
        out_shape=[*map(_shape, ends), *map(_shape, given)],
        scratch_shapes=[pltpu.VMEM((1, *a.shape[1:]), a.dtype) for a in ends],
        compiler_params=_compiler(options),
        interpret=options.interpret,
        name=f"{options.name}_backward",
    )(*leaves, *given, *ends, *outs)
    n = len(ends)
    return jax.tree.unflatten(tree, found[:n]), jax.tree.unflatten(token_tree, found[n:])


chunk_loop.defvjp(_loop_fwd, _loop_bwd)
