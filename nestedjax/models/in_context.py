"""A continuum memory that learns inside each sequence, by the model's own next-token loss."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nestedjax import levels
from nestedjax.layers import CMSConfig, Embed, InnerConfig, param, weight_dtype
from nestedjax.levels import Box, Carry, Level
from nestedjax.levels.describe import count, size
from nestedjax.models.inner_optimizer import inner_optimizer, switched_writes
from nestedjax.models.language_model import LanguageModel
from nestedjax.models.periods import block_labels
from nestedjax.optim import boxes_of, in_tokens
from nestedjax.sharding import over_batch

PyTree = Any


class Weights(NamedTuple):
    """The slow parameters of an in-context model.

    Attributes:
      model: the weights of the language model; those of the continuum memory are its start.
      rates: logarithms of the factors on the inner learning rate.
    """

    model: PyTree
    rates: Float[Array, "blocks layers"]


class Reading(NamedTuple):
    """The state of sequences that are read without being learned from.

    Attributes:
      fast: the fast weights of each sequence.
      carry: the language model's own state.
    """

    fast: PyTree
    carry: PyTree


class InContextModel(nnx.Module):
    """A language model whose continuum memory learns from the text it reads (spec D4b).

    Each sequence has its own copy of the blocks that have a period, started from the learned
    weights. The text is read in chunks of the fastest period; when the first token of the next
    chunk is known, the gradient of the chunk's next-token loss steps the blocks that are due. The
    state of the past is a constant for that gradient. The outer gradient reaches the start, the
    inner learning rates (one factor per block and layer) and all else through the updates.

    Its interface is that of `LanguageModel`; leaves of its state are [batch, ...].

    Args:
      model: the language model; its weights are shared, not copied.
      cms: periods in tokens of the sequence and the inner optimizer.

    Reference: Nested Learning (arXiv 2512.24695), equations 70-73 and section 7.1.
    """

    def __init__(self, model: LanguageModel, cms: CMSConfig):
        self.config = model.config.with_continuum(cms)
        self.base = model
        shape = (len(cms.timed), self.config.layers)
        start = jnp.zeros(shape, weight_dtype(self.config.dtype))
        self.rates = param(start, ("levels", "layers"), matrix=None, weight_decay=False)
        # (label, switch) of blocks that do not learn in context; see `models.switched`
        self.switches: tuple[tuple[str, str], ...] = ()
        if not self.config.writes:
            self.switches = tuple((label, "frozen") for label in self.learning)

    @property
    def embed(self) -> Embed:
        """The embedding: `logits = model.embed.attend(hidden)`."""
        return self.base.embed

    @property
    def learning(self) -> tuple[str, ...]:
        """The labels of the blocks that learn in context, the fastest first."""
        return tuple(self._cms.block_periods)

    def init_state(self, batch_size: int) -> PyTree:
        """The state of `batch_size` sequences at the start of a context."""
        level, weights = self._level()
        carry = levels.start(level, weights, jnp.zeros((1,), jnp.int32))
        many = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (batch_size, *a.shape)), carry)
        return over_batch(many)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: PyTree = None,
        *,
        resets: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], PyTree]:
        """Logits of the token after each of `tokens`, and the state; see `LanguageModel`.

        Documents (`resets`) begin on a boundary of the fastest period.
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
        """What `__call__` computes before the head."""
        level, weights = self._level()
        if resets is not None:  # inside of `vmap` no flag is known any more
            position = 0 if state is None else state.position
            levels.misplaced("the model", level.period, position, resets)

        def one(carry, tokens, reset):
            start = level.init(weights) if carry is None else carry
            return levels.run(level, weights, start, tokens, reset=reset)

        return jax.vmap(one)(state, tokens.astype(jnp.int32), resets)

    def probe(
        self, tokens: Int[Array, "B T"], *, resets: Bool[Array, "B T"] | None = None
    ) -> dict[str, Array]:
        """The intermediate activations of the language model at the start's weights."""
        return self.base.probe(tokens, resets=resets)

    def settle(self, state: PyTree) -> Reading:
        """Stop learning: the fast weights as they are, for `read`.

        Pending tokens are read once more; the write that waits for the next token is not made.
        """
        level, weights = self._level()
        forward, period = self._forward(), self._cms.timed[0]

        def one(carry: Carry) -> Reading:
            pending = carry.position % period
            after, _ = level.step(weights, carry.state, carry.pending)
            fast = jax.tree.map(
                lambda new, old: jnp.where(pending > 0, new, old), after.fast, carry.state.fast
            )

            def next_token(i, held):
                return forward(weights, fast, held, carry.pending[i][None])[1]

            held = carry.state.carry
            if self._aligned:
                held = levels.resumed(held, self.base.init_state(1))
            return Reading(fast, jax.lax.fori_loop(0, pending, next_token, held))

        return jax.vmap(one)(state)

    def read(
        self, tokens: Int[Array, "B T"], state: Reading
    ) -> tuple[Float[Array, "B T V"], Reading]:
        """Logits at each sequence's own fast weights, which stay as they are; O(1) a token."""
        _, weights = self._level()
        forward = self._forward()

        def one(state, tokens):
            hidden, carry = forward(weights, state.fast, state.carry, tokens)
            return hidden, Reading(state.fast, carry)

        hidden, state = jax.vmap(one)(state, tokens)
        return self.embed.attend(hidden), state

    def boxes(self) -> list[Box]:
        """The boxes of the nested system; see `LanguageModel.boxes`."""
        cms, graphdef = self._cms, nnx.split(self)[0]
        rule = cms.inner.optimizer
        state = jax.eval_shape(
            lambda weights: nnx.merge(graphdef, weights).init_state(1), nnx.state(self)
        ).state
        steps, needs = _in_chunks(cms), {}
        tokens = in_tokens(steps, step_tokens=cms.timed[0])
        memories = boxes_of(state.optimizer)(tokens)
        frozen = {f"cms.{i}" for i in range(len(cms.periods))} - set(steps)
        boxes = [
            dataclasses.replace(box, period=None, rule="") if box.name in frozen else box
            for box in self.base.boxes()
            if box.name not in steps
        ] + memories
        boxes.append(Box("inner rates", None, self.rates.size, 0, "next token", "", "gen_context"))
        for label, period in cms.block_periods.items():
            held = state.fast[label]
            boxes += [
                Box(f"{label} start", None, count(held), 0, "next token", "", "init"),
                Box(label, period, count(held), size(held), "next token", rule, "init"),
            ]
            needs[label] = [box.name for box in memories if box.name.startswith(f"{label} ")]
        return levels.describe(boxes, dependencies=needs)

    def _forward(self):
        """`forward(weights, fast, carry, tokens[P]) -> (hidden[P, d], carry)` of one sequence."""
        graphdef, _ = nnx.split(self.base)

        def forward(weights, fast, carry, tokens):
            model = nnx.merge(graphdef, _put(weights.model, fast))
            hidden, carry = model.hidden(tokens[None], carry)
            return hidden[0], carry

        return forward

    @property
    def _cms(self) -> CMSConfig:
        """The continuum memory, which every in-context model has."""
        cms = self.config.continuum
        assert cms is not None
        return cms

    @property
    def _aligned(self) -> bool:
        """Whether the memories of the model have nothing pending where a chunk ends."""
        return self._cms.timed[0] % max(self.config.chunks, default=1) == 0

    def _level(self) -> tuple[Level, Weights]:
        """The model as a level that learns from what it reads, and its slow parameters."""
        graphdef, weights = nnx.split(self.base)
        cms, forward = self._cms, self._forward()
        plain = levels.at_boundary if self._aligned else lambda carry: carry

        def chunk(weights, fast, carry, tokens):
            hidden, carry = forward(weights, fast, carry, tokens)
            return hidden, plain(carry)

        def loss(weights, hidden, labels):
            logits = nnx.merge(graphdef, weights.model).embed.attend(hidden)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

        level = levels.adaptive_level(
            "continuum memory",
            cms.timed[0],
            forward=chunk,
            loss=loss,
            tx=lambda weights: switched_writes(
                inner_optimizer(cms, _in_chunks(cms), weights.rates), dict(self.switches)
            ),
            init_fast=lambda weights: _take(weights.model, cms),
            init_carry=lambda weights: plain(nnx.merge(graphdef, weights.model).init_state(1)),
            second_order=cms.inner.second_order,
            reduction=cms.inner.reduction,
        )
        return level, Weights(weights, self.rates[...])


def adapting(
    model: LanguageModel | InContextModel,
    *,
    periods: tuple[int | None, ...] | None = None,
    inner: InnerConfig | None = None,
) -> InContextModel:
    """A trained model with the same weights whose continuum memory learns from what it reads.

    Args:
      model: a model with a continuum memory; its weights are shared, not copied.
      periods: of each block, in tokens of a sequence, fast first; None keeps those of the model.
      inner: how the blocks learn; None for that of the model's configuration.

    Returns:
      A model with the interface of `LanguageModel`; with learning rate 0 its logits are the same.

    Raises:
      ValueError: if the model has no continuum memory, or no block with a period.

    Example:
      >>> from flax import nnx
      >>> from nestedjax import models
      >>> def learner():
      ...     model = models.build("hope_nano", rngs=nnx.Rngs(0))
      ...     return models.adapting(model, periods=(16, 64, None, None))
      >>> learner = nnx.eval_shape(learner)  # without allocating anything
      >>> learner.config.cms.lifetime, learner.config.cms.timed
      ('in_context', (16, 64))
    """
    cms = model.config.continuum
    if cms is None:
        raise ValueError(
            f"{type(model.config).__name__} has no continuum memory that could learn in context:"
            " use a hope or hope_attention model"
        )
    if periods is not None and len(periods) != len(cms.periods):
        raise ValueError(f"periods={periods}: the model has {len(cms.periods)} blocks")
    cms = dataclasses.replace(
        cms,
        lifetime="in_context",
        periods=cms.periods if periods is None else periods,
        inner=cms.inner if inner is None else inner,
    )
    return InContextModel(model.base if isinstance(model, InContextModel) else model, cms)


def _in_chunks(cms: CMSConfig) -> dict[str, int | None]:
    """Label -> chunks of the fastest period between two writes."""
    return {label: period // cms.timed[0] for label, period in cms.block_periods.items()}


def _take(weights: PyTree, cms: CMSConfig) -> dict[str, tuple[Array, ...]]:
    """The weights that learn in context, by the label of their block."""
    names = jax.tree.leaves(block_labels(weights))
    leaves = jax.tree.leaves(weights)
    return {
        label: tuple(leaf for name, leaf in zip(names, leaves, strict=True) if name == label)
        for label in cms.block_periods
    }


def _put(weights: PyTree, fast: dict[str, tuple[Array, ...]]) -> PyTree:
    """`weights` with the fast ones in their places."""
    names = jax.tree.leaves(block_labels(weights))
    leaves, structure = jax.tree.flatten(weights)
    queues = {label: iter(values) for label, values in fast.items()}
    new = [
        next(queues[name]) if name in queues else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, new)
