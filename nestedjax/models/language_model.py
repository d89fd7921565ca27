"""A language model: embedding, stacked blocks, final norm, tied head."""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nestedjax import levels
from nestedjax.layers import Embed, RMSNorm, is_param
from nestedjax.layers.boxes import merged, slow
from nestedjax.levels import Box
from nestedjax.models.block import init_states, scan_blocks, stack
from nestedjax.models.config import ModelConfig
from nestedjax.sharding import constrain

PyTree = Any


class LanguageModel(nnx.Module):
    """Tokens to next-token logits, with a state that belongs to each sequence.

    The module holds slow weights and static configuration; everything that a sequence changes is in
    the state, a pytree of arrays [layers, batch, ...]. Feeding a sequence in any number of pieces
    gives what feeding it whole gives. Without dropout, training and evaluation are one function.

    Args:
      config: the model's configuration, which builds its blocks.
      rngs: where the weights are drawn.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from nestedjax import models
      >>> model = models.build("transformer_nano", rngs=nnx.Rngs(0))
      >>> tokens = jnp.zeros((1, 6), jnp.int32)
      >>> whole, _ = model(tokens)
      >>> first, state = model(tokens[:, :4])
      >>> second, state = model(tokens[:, 4:], state)
      >>> bool(jnp.allclose(whole, jnp.concatenate([first, second], 1), atol=1e-5))
      True
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(
            config.vocab, config.width, std=config.embedding_std, dtype=config.dtype, rngs=rngs
        )
        self.blocks = stack(
            lambda streams: config.block(rngs=streams), config.layers // config.pattern, rngs=rngs
        )
        if len(self.blocks) != config.pattern:
            raise ValueError(
                f"{type(config).__name__}.block returns {len(self.blocks)} blocks and its pattern"
                f" is {config.pattern}: let pattern return {len(self.blocks)}"
            )
        self.norm = RMSNorm((config.width,), ("embed",), dtype=config.dtype)

    def init_state(self, batch_size: int) -> PyTree:
        """The state of `batch_size` sequences at the start of a context."""
        return init_states(self.blocks, batch_size)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: PyTree = None,
        *,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], PyTree]:
        """Logits of the token after each of `tokens`.

        Args:
          tokens: int32 [B, T], any T >= 1.
          state: from `init_state` or an earlier call; None at the start of a context, which is the
            fastest path and gives the same values as `init_state`.
          resets: True at the first token of a new document inside a packed sequence. For models
            with memories it stands on a boundary of `config.period`, counted from the start of the
            context.

        Returns:
          Logits [B, T, V] in at least float32, and the state after the T tokens.

        Raises:
          ValueError: a document begins inside a period. Under `jax.jit` flags are not known: then
            the logits and the state of that sequence are NaN.
        """
        hidden, state = self.hidden(tokens, state, resets=resets)
        return self.embed.attend(hidden), state

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        state: PyTree = None,
        *,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T d"], PyTree]:
        """What `__call__` computes before the head: `logits = model.embed.attend(hidden)`."""
        if resets is not None:
            period = self.config.period
            levels.misplaced("the model", period, levels.position_of(state), resets)
        x = constrain(self.embed(tokens), "batch", "time", "embed")
        x, state = scan_blocks(self.blocks, x, state, resets=resets, remat=self.config.remat)
        return self.norm(x), state

    def probe(
        self, tokens: Int[Array, "B T"], *, resets: Bool[Array, "B T"] | None = None
    ) -> dict[str, Array]:
        """Every named intermediate activation of a fresh context, in the order it is computed.

        Keys are "embed", "blocks.0.memory", "blocks.0.cms", ..., "norm" and "logits"; the halves
        of a block go by the names of their layers.
        """
        x = constrain(self.embed(tokens), "batch", "time", "embed")
        found = {"embed": x}
        x, halves = scan_blocks(
            self.blocks, x, None, resets=resets, remat=self.config.remat, probe=True
        )
        pattern = len(self.blocks)
        for index in range(self.config.layers):
            block, outputs = self.blocks[index % pattern], halves[index % pattern]
            for (_, layer, _), values in zip(block.halves(), outputs, strict=False):
                found[f"blocks.{index}.{layer.name}"] = values[index // pattern]
        found["norm"] = self.norm(x)
        found["logits"] = self.embed.attend(found["norm"])
        return found

    def boxes(self) -> list[Box]:
        """The boxes of the nested system, each summed over the layers.

        State bytes are those of one sequence's fast weights, attention cache and convolutions, not
        of the tokens of unfinished chunks. Works on an abstract model (`nnx.eval_shape`).
        """
        graphdef, weights = nnx.split(self)
        state = jax.eval_shape(lambda weights: nnx.merge(graphdef, weights).init_state(1), weights)
        boxes = [slow("embedding", self.embed), slow("norms", self.norm)]
        for block, held in zip(self.blocks, state, strict=True):
            boxes += block.boxes(held)
        return levels.describe(merged(boxes))


def logical_axes(params: PyTree) -> PyTree:
    """The logical names of every weight's dimensions, for `nestedjax.sharding`.

    Args:
      params: `nnx.split(model)[1]` or `nnx.state(model, nnx.Param)`, also abstract.

    Returns:
      The same structure with a `PartitionSpec` of names in place of each array.
    """
    weights = jax.tree.leaves(params, is_leaf=is_param)
    names = [PartitionSpec(*weight.get_metadata("axes")) for weight in weights]
    return jax.tree.unflatten(jax.tree.structure(params), names)


def parameter_count(model: nnx.Module) -> int:
    """How many slow parameters a model has; works on an abstract model (`nnx.eval_shape`)."""
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)
