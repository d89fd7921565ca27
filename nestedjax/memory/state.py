"""What a memory reads and what it carries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nestedjax.memory.architectures import Architecture, Features, Weights
from nestedjax.memory.features import FeatureMap
from nestedjax.memory.objectives import Objective
from nestedjax.memory.retention import Retention
from nestedjax.memory.rules import Rule
from pallas_kernels import accumulation_dtype


class Tokens(NamedTuple):
    """The tokens of one sequence, as a memory sees them; inside a scan one token, without T.

    Attributes:
      keys: [T, dk].
      values: [T, dv].
      queries: [T, dk].
      learning_rate: [T], inner learning rate, at least 0; None for a level that makes its own.
      decay: [T] in (0, 1], what the memory is multiplied by before the token is written; None where
        the retention has no use for it.
      momentum: [T] in [0, 1]; None unless the rule has momentum.
      threshold: [T], > 0; None unless the objective's threshold depends on the token.
      rate_offset: [T]; None unless the rule is `mean_gradient`, which adds it to 1/j.
    """

    keys: Float[Array, "*T dk"]
    values: Float[Array, "*T dv"]
    queries: Float[Array, "*T dk"]
    # every memory of this folder needs it
    learning_rate: Float[Array, "*T"] = None  # type: ignore[assignment]
    decay: Float[Array, "*T"] | None = None
    momentum: Float[Array, "*T"] | None = None
    threshold: Float[Array, "*T"] | None = None
    rate_offset: Float[Array, "*T"] | None = None


# the axes of one sequence's arrays, as `Level.ndim` says them
TOKEN_AXES = Tokens(2, 2, 2, *(1,) * (len(Tokens._fields) - 3))  # type: ignore[arg-type]


class Window(NamedTuple):
    """Tokens whose gradients enter one update; before the first token the learning rate is 0."""

    keys: Float[Array, "*T dk"]
    values: Float[Array, "*T dv"]
    learning_rate: Float[Array, "*T"]
    threshold: Float[Array, "*T"] | None


class MemoryState(NamedTuple):
    """What the memory of one sequence carries from chunk to chunk, in float32 or wider.

    Attributes:
      weights: a tuple of [m, n]; where the retention has a link, the accumulators of the weights.
      momentum: like `weights`; None for a rule without momentum.
      window: the `window - 1` tokens before the chunk; None for a rule without a window.
      place: tokens since the chunk's start; None but inside a chunk of `mean_gradient`, where
        `momentum` is the sum of the gradients since then.
    """

    weights: Weights
    momentum: Weights | None
    window: Window | None
    place: Int[Array, ""] | None = None  # shape=(), dtype=int32


class Memory(NamedTuple):
    """One entry of each menu, and a switch: what every execution of the memory is given.

    With "not_written" no gradient is written while decay and erasure act; with "frozen" the tokens
    come with learning rate 0 and decay 1.
    """

    architecture: Architecture
    objective: Objective
    retention: Retention
    rule: Rule
    read: str
    feature_map: FeatureMap
    value_map: FeatureMap
    switch: str | None = None

    @property
    def silent(self) -> bool:
        """Whether its write term is zero."""
        return self.switch == "not_written"

    def link(self, accumulators: Weights) -> Weights:
        """The weights that the accumulators stand for."""
        link = self.retention.link
        return accumulators if link is None else tuple(link(a) for a in accumulators)

    def factors(self, weights: Weights, tokens: "Tokens | Window") -> tuple[Features, Features]:
        """Layer inputs and local errors of all tokens at these weights, a pair for each matrix."""
        keys, values = tokens.keys, tokens.values
        output, inputs, pull = self.architecture.linearise(weights, keys)
        error = self.output_error(output, tokens)
        if self.objective.deflate is not None:
            inputs = (self.objective.deflate(weights[0], keys, values),)
        return inputs, pull(error)

    def output_error(
        self, output: Float[Array, "*t dv"], tokens: "Tokens | Window"
    ) -> Float[Array, "*t dv"]:
        """Derivative, by the memory's output, of the loss that the rule descends; 0 if silent."""
        if self.silent:
            return jnp.zeros_like(output)
        error = self.objective.error(output, tokens.values, tokens.threshold)
        if self.rule.functional:
            body = output - tokens.keys if self.architecture.residual else output
            error = error + body
        return error

    def erase(
        self,
        m: int,
        learning_rate: Float[Array, "*t"],
        decay: Float[Array, "*t"],
        x: Float[Array, "*t n"],
    ) -> Float[Array, "*t"] | None:
        """How strongly matrix m forgets its layer input x [..., n]; None: not at all."""
        rule = self.rule
        if rule.erase is None or (rule.input_only and m not in self.architecture.inputs):
            return None
        return rule.erase(learning_rate, decay, jnp.sum(x * x, axis=-1))

    def write(
        self, learning_rate: Float[Array, "*t"], x: Float[Array, "*t n"]
    ) -> Float[Array, "*t"]:
        """The learning rate with which the gradient on layer input x [..., n] is written."""
        if self.rule.write is None:
            return learning_rate
        return self.rule.write(learning_rate, jnp.sum(x * x, axis=-1))


def initial_state(memory: Memory, params: Weights) -> MemoryState:
    """The state at the start of a context: the meta-learned weights, nothing else."""
    weights = tuple(w.astype(accumulation_dtype(w)) for w in params)
    dtype, before = weights[0].dtype, memory.rule.window - 1
    window = None
    if before:
        window = Window(
            keys=jnp.zeros((before, memory.architecture.key_dim), dtype),
            values=jnp.zeros((before, memory.architecture.value_dim), dtype),
            learning_rate=jnp.zeros((before,), dtype),
            threshold=jnp.ones((before,), dtype) if memory.objective.token_threshold else None,
        )
    momentum = tuple(jnp.zeros_like(w) for w in weights) if memory.rule.momentum else None
    return MemoryState(weights, momentum, window)


def running_start(memory: Memory, state: MemoryState) -> MemoryState:
    """The state inside a chunk, before its first token."""
    if not memory.rule.mean:
        return state
    sums = tuple(jnp.zeros_like(w) for w in state.weights)
    return state._replace(momentum=sums, place=jnp.zeros((), jnp.int32))


def mean_rates(place: Int[Array, "*t"], tokens: Tokens) -> Float[Array, "*t"]:
    """`rate_j` of `mean_gradient` for tokens with `place` tokens of their chunk before them."""
    rate = 1.0 / (place + 1).astype(tokens.learning_rate.dtype)
    if tokens.rate_offset is None:
        return rate
    return jnp.maximum(rate + tokens.rate_offset, 0.0)


def prepare(memory: Memory, tokens: Tokens, dtype: jnp.dtype) -> Tokens:
    """The tokens in the state's dtype, with the feature and value maps applied."""
    tokens = jax.tree.map(lambda x: x.astype(dtype), tokens)
    if memory.switch == "frozen":
        kept = None if tokens.decay is None else jnp.ones_like(tokens.decay)
        still = jnp.zeros_like(tokens.learning_rate)
        tokens = tokens._replace(learning_rate=still, decay=kept)
    return tokens._replace(
        keys=memory.feature_map(tokens.keys),
        queries=memory.feature_map(tokens.queries),
        values=memory.value_map(tokens.values),
    )


def with_window(state: MemoryState, tokens: Tokens) -> Window:
    """The tokens of the chunk behind those of the window before it."""
    chunk = Window(tokens.keys, tokens.values, tokens.learning_rate, tokens.threshold)
    if state.window is None:
        return chunk
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new]), state.window, chunk)


def next_window(memory: Memory, extended: Window) -> Window | None:
    """The window that the next chunk starts with."""
    before = memory.rule.window - 1
    if not before:
        return None
    return jax.tree.map(lambda x: x[-before:], extended)
