"""Stacked blocks: one module whose weights carry a leading layer axis, scanned over the layers.

A block is a module with two halves, `mix` (the sequence mixer, with state) and `feed` (what acts on
each token alone), each with its residual inside:

    init_state(batch) -> state
    boxes(state) -> boxes, of one block for the state of one sequence
    mix(x[B, T, d], state or None, *, resets) -> (x, state)
    feed(x[B, T, d]) -> x

and `names`, what a probe calls the two. Compile time does not grow with depth.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from nestedjax.sharding import constrain

PyTree = Any
Block = Any  # an nnx.Module with the methods above

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack(make: Callable[[nnx.Rngs], Block], layers: int, *, rngs: nnx.Rngs) -> Block:
    """`layers` independently drawn blocks as one module, with "layers" as each weight's first axis.

    Args:
      make: builds one block from the random streams.
      layers: how many.
      rngs: where the blocks draw their weights.
    """
    made = []

    def weights(key: Array) -> PyTree:
        graphdef, state = nnx.split(make(nnx.Rngs(key)))
        made.append(graphdef)
        return state

    # One trace, however many layers.
    stacked = jax.vmap(weights)(jax.random.split(rngs.params(), layers))

    def name(weight: nnx.Param) -> nnx.Param:
        return nnx.Param(weight[...], axes=("layers", *weight.get_metadata("axes")))

    stacked = jax.tree.map(name, stacked, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return nnx.merge(made[0], stacked)


def init_states(blocks: Block, batch: int) -> PyTree:
    """The state of every block for `batch` sequences, leaves [layers, batch, ...]."""
    graphdef, params = nnx.split(blocks)
    return jax.vmap(lambda weights: nnx.merge(graphdef, weights).init_state(batch))(params)


def scan_blocks(
    blocks: Block,
    x: Float[Array, "B T d"],
    states: PyTree,
    *,
    resets: Bool[Array, "B T"] | None,
    remat: str,
    probe: bool = False,
) -> tuple[Float[Array, "B T d"], PyTree]:
    """Run every block in turn.

    Args:
      blocks: a module made by `stack`.
      x: activations.
      states: stacked block states, or None for a fresh context.
      resets: True at the first token of a new document.
      remat: "none", "tokens" (recompute each block's `feed` from its input; a `mix` that recomputes
        its own chunks adds what it does to tokens), "full" (recompute all but the block inputs) or
        "dots" (as "full", but keep matrix products).
      probe: return the two halves' outputs of every layer in place of the states.

    Returns:
      The activations and the stacked states after the T tokens.
    """
    graphdef, params = nnx.split(blocks)
    # A `sequence` axis of the mesh splits what acts on each token; mixers see whole sequences.
    resets = None if resets is None else constrain(resets, "batch", None)

    def body(x: Array, layer: tuple[PyTree, PyTree]) -> tuple[Array, PyTree]:
        weights, state = layer
        block = nnx.merge(graphdef, weights)
        whole = constrain(x, "batch", None, "embed")
        mixed, state = block.mix(whole, state, resets=resets)
        mixed = constrain(mixed, "batch", "time", "embed")
        x = jax.checkpoint(block.feed)(mixed) if remat == "tokens" else block.feed(mixed)
        return x, (mixed, x) if probe else state

    if remat in REMAT_POLICIES:
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (params, states))
