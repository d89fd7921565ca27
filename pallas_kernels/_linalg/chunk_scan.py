"""A scan over the chunks of sequences that reads and writes tokens where they lie.

`jax.lax.scan` scans the first axis and stacks its outputs along it. For tokens [..., T, d] that
means a transposed copy of every array in each direction, which on a CPU costs as much as the
products of a chunk of 32. Here each step slices its tokens out of the arrays of the whole length,
and writes its outputs, and in the backward pass its gradients, into others. The state at the start
of every chunk is stored, and nothing for single tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._linalg.derivatives import differentiable

# (state, tokens of a chunk) -> (state, outputs): trees of arrays; it captures no arrays
Chunk = Callable[[Any, Any], tuple[Any, Any]]


def chunk_scan(chunk: Chunk, size: int, axis: int, state: Any, tokens: Any) -> tuple[Any, Any]:
    """Run `chunk` over chunks of `size` tokens, each recomputed in the backward pass.

    Args:
      chunk: a hashable function; see `Chunk`.
      size: tokens of a chunk; divides T.
      axis: of the tokens, counted from the front, in every array of `tokens` and of the outputs.
      state: a tree at the start.
      tokens: a tree of arrays of T tokens.

    Returns:
      The state after the last chunk, and the outputs, a tree of arrays of T tokens.
    """
    return _scan(state, tokens, chunk, size, axis)


def _slice(tree, index, size, axis):
    return jax.tree.map(
        lambda a: jax.lax.dynamic_slice_in_dim(a, index * size, size, axis=axis), tree
    )


def _put(into, tree, index, size, axis):
    return jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, index * size, axis=axis),
        into,
        jax.lax.optimization_barrier(tree),
    )


def _whole(leaf, *, axis, size):
    """Zeros like `leaf`, but for `size` tokens."""
    shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
    return jnp.zeros(shape, leaf.dtype, device=leaf.sharding)


def _forward(chunk, size, axis, state, tokens, *, keep):
    count = jax.tree.leaves(tokens)[0].shape[axis] // size
    _, out = jax.eval_shape(lambda s, t: chunk(s, _slice(t, 0, size, axis)), state, tokens)

    whole = partial(_whole, axis=axis, size=count * size)

    def step(carry, index):
        state, outputs = carry
        new, out = chunk(state, _slice(tokens, index, size, axis))
        return (new, _put(outputs, out, index, size, axis)), (state if keep else None)

    carry, starts = jax.lax.scan(step, (state, jax.tree.map(whole, out)), jnp.arange(count))
    return carry, starts


def _scan_forward(state, tokens, chunk, size, axis):
    found, starts = _forward(chunk, size, axis, state, tokens, keep=True)
    return found, (starts, tokens)


def _scan_tangent(chunk, size, axis, kept, tangents):
    """The same scan of the tangents, of each chunk at its stored start."""
    (starts, tokens), (of_state, of_tokens) = kept, tangents
    whole = partial(_whole, axis=axis, size=jax.tree.leaves(tokens)[0].shape[axis])
    primal = jax.eval_shape(
        lambda starts, t: chunk(jax.tree.map(lambda a: a[0], starts), _slice(t, 0, size, axis)),
        starts,
        tokens,
    )

    def step(carry, given):
        of_state, of_outputs = carry
        index, start = given
        here = [_slice(tree, index, size, axis) for tree in (tokens, of_tokens)]
        _, (of_state, of_out) = jax.jvp(chunk, (start, here[0]), (of_state, here[1]))
        return (of_state, _put(of_outputs, of_out, index, size, axis)), None

    begin = (of_state, jax.tree.map(whole, primal[1]))
    count = jax.tree.leaves(starts)[0].shape[0]
    return jax.lax.scan(step, begin, (jnp.arange(count), starts))[0]


def _scan_transpose(chunk, size, axis, kept, cotangents):
    starts, tokens = kept
    of_state, of_outputs = cotangents
    count = jax.tree.leaves(tokens)[0].shape[axis] // size

    def step(carry, given):
        of_state, of_tokens = carry
        index, start = given
        _, pull = jax.vjp(chunk, start, _slice(tokens, index, size, axis))
        of_state, found = pull((of_state, _slice(of_outputs, index, size, axis)))
        return (of_state, _put(of_tokens, found, index, size, axis)), None

    begin = (of_state, jax.tree.map(jnp.zeros_like, tokens))
    (of_state, of_tokens), _ = jax.lax.scan(step, begin, (jnp.arange(count), starts), reverse=True)
    return of_state, of_tokens


_scan = differentiable(
    lambda state, tokens, chunk, size, axis: _forward(chunk, size, axis, state, tokens, keep=False)[
        0
    ],
    _scan_forward,
    _scan_tangent,
    _scan_transpose,
    static=3,
)
