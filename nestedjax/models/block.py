"""Blocks: a sequence mixer and a feed-forward network, each with norm and residual; stacks of them.

    x <- x + mixer(norm(x)),  x <- x + feed_forward(norm(x))

A model is a pattern of one or more blocks, repeated. The weights of its repetitions carry a leading
layer axis and are scanned over, so that compile time does not grow with depth.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from nestedjax.layers import Layer, RMSNorm, Sizes, is_param
from nestedjax.layers.boxes import slow
from nestedjax.layers.recompute import POLICIES
from nestedjax.levels import Box
from nestedjax.sharding import constrain

PyTree = Any
Blocks = Any  # an nnx.List of Block, as `stack` makes it


class Block(nnx.Module):
    """One block.

    Its state is `{"mixer": ..., "feed_forward": ...}`, as the two layers keep theirs.

    Args:
      config: the model's configuration.
      mixer: what mixes tokens.
      feed_forward: what acts on each token; it may have a state; None for a block without.
    """

    def __init__(self, config: Sizes, mixer: Layer, feed_forward: Layer | None = None):
        def norm(layer: Layer | None) -> Any:
            if layer is None or not layer.residual:
                return nnx.data(None)
            return RMSNorm((config.width,), ("embed",), dtype=config.dtype)

        self.mixer = mixer
        self.mixer_norm = norm(mixer)
        self.feed_forward = nnx.data(None) if feed_forward is None else feed_forward
        self.feed_forward_norm = norm(feed_forward)

    def halves(self) -> list[tuple[str, Layer, RMSNorm | None]]:
        """Key in the state, layer and norm of each half."""
        found = [("mixer", self.mixer, self.mixer_norm)]
        if self.feed_forward is not None:
            found.append(("feed_forward", self.feed_forward, self.feed_forward_norm))
        return found

    def init_state(self, batch: int) -> dict:
        """The state of `batch` sequences at the start of a context."""
        return {key: layer.init_state(batch) for key, layer, _ in self.halves()}

    def boxes(self, state: dict) -> list[Box]:
        """The boxes of the block; `state` as `init_state(1)` returns it (arrays or shapes)."""
        boxes = [slow("norms", self.mixer_norm, self.feed_forward_norm)]
        return boxes + [box for key, layer, _ in self.halves() for box in layer.boxes(state[key])]

    def mix(self, x: Array, state: dict | None, **options: Any) -> tuple[Array, Any, list]:
        """The first half: activations, the mixer's state, values for the blocks above."""
        return _half(self.mixer, self.mixer_norm, x, state and state["mixer"], **options)

    def feed(self, x: Array, state: dict | None, **options: Any) -> tuple[Array, Any, list]:
        """The second half: activations, the network's state, values for the blocks above."""
        if self.feed_forward is None:
            return x, None, []
        held = state and state["feed_forward"]
        return _half(self.feed_forward, self.feed_forward_norm, x, held, **options)


def _half(layer: Layer, norm, x, state, *, resets, first: list) -> tuple[Array, PyTree, list]:
    """`x + layer(norm(x))`, the layer's state, and what it hands to the blocks above."""
    options: dict[str, Any] = {"resets": resets}
    if layer.shares:
        options["first"] = first.pop(0) if first else None
    value: list
    y, state, *value = layer(x if norm is None else norm(x), state, **options)
    return (y if norm is None else x + y), state, value


def stack(
    make: Callable[[nnx.Rngs], Block | Sequence[Block]], repetitions: int, *, rngs: nnx.Rngs
) -> Blocks:
    """Independently drawn repetitions of a pattern, with "layers" as each weight's first axis.

    Args:
      make: builds one block, or the blocks of a pattern, from the random streams.
      repetitions: of the pattern.
      rngs: where the blocks draw their weights.

    Returns:
      The blocks of the pattern, each standing for all of its repetitions.
    """
    made = []

    def weights(key: Array) -> PyTree:
        blocks = make(nnx.Rngs(key))
        pattern = nnx.List([blocks] if isinstance(blocks, Block) else list(blocks))
        graphdef, state = nnx.split(pattern)
        made.append(graphdef)
        return state

    # One trace, however many repetitions.
    stacked = jax.vmap(weights)(jax.random.split(rngs.params(), repetitions))

    def layered(weight: nnx.Param) -> nnx.Param:
        metadata = weight.get_metadata()
        return nnx.Param(weight[...], **{**metadata, "axes": ("layers", *metadata["axes"])})

    stacked = jax.tree.map(layered, stacked, is_leaf=is_param)
    return nnx.merge(made[0], stacked)


def init_states(blocks: Blocks, batch: int) -> PyTree:
    """The state of every block for `batch` sequences, leaves [repetitions, batch, ...]."""
    graphdef, params = nnx.split(blocks)

    def states(weights: PyTree) -> tuple:
        return tuple(block.init_state(batch) for block in nnx.merge(graphdef, weights))

    return jax.vmap(states)(params)


def scan_blocks(
    blocks: Blocks,
    x: Float[Array, "B T d"],
    states: PyTree,
    *,
    resets: Bool[Array, "B T"] | None,
    remat: str,
    probe: bool = False,
) -> tuple[Float[Array, "B T d"], PyTree]:
    """Run every block in turn.

    Args:
      blocks: made by `stack`.
      x: activations.
      states: stacked block states, or None for a fresh context.
      resets: True at the first token of a new document.
      remat: see `ModelConfig`.
      probe: return the outputs of both halves of every block in place of the states.

    Returns:
      The activations and the stacked states after the T tokens.
    """
    graphdef, params = nnx.split(blocks)
    # A `sequence` axis of the mesh splits what acts on each token; mixers see whole sequences.
    resets = None if resets is None else constrain(resets, "batch", None)

    def pattern(x: Array, layer: tuple[PyTree, PyTree], first: list) -> tuple[Array, PyTree, list]:
        weights, held = layer
        after, shared, first = [], [], list(first)
        for index, block in enumerate(nnx.merge(graphdef, weights)):
            state = None if held is None else held[index]
            x, state, values = _both(block, x, state, resets, first, remat, probe)
            after.append(state)
            shared += values
        return x, tuple(after), shared

    if remat in POLICIES:
        pattern = jax.checkpoint(pattern, policy=POLICIES[remat], prevent_cse=False)
    layers = (params, states)
    if not any(layer.shares for block in blocks for _, layer, _ in block.halves()):
        return jax.lax.scan(lambda x, layer: pattern(x, layer, [])[:2], x, layers)
    # The first repetition by itself: what it hands on is a constant of the scan over the others.
    x, start, first = pattern(x, jax.tree.map(lambda a: a[0], layers), [])
    rest = jax.tree.map(lambda a: a[1:], layers)
    x, after = jax.lax.scan(lambda x, layer: pattern(x, layer, first)[:2], x, rest)
    join = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, after)
    return x, join


def _both(block: Block, x, state, resets, first: list, remat: str, probe: bool):
    """One block: activations, its state (or both halves' outputs), values for those above."""
    options = {"resets": resets, "first": first}
    mixed, of_mixer, values = block.mix(constrain(x, "batch", None, "embed"), state, **options)
    mixed = constrain(mixed, "batch", "time", "embed")

    def feed(x, held):
        return block.feed(x, held, **options)

    y, of_feed, more = (jax.checkpoint(feed) if remat == "tokens" else feed)(mixed, state)
    if probe:
        return y, (mixed, y), values + more
    after = {"mixer": of_mixer}
    if block.feed_forward is not None:
        after["feed_forward"] = of_feed
    return y, after, values + more
