"""The operands that every implementation of the deep memory shares; tokens are the last axis.

`*b` stands for leading axes such as batch and heads, n for the memories of a group.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class FastWeights(NamedTuple):
    """The fast weights of a group of memories M(z) = z + U s(V z), in at least float32.

    Attributes:
      inner: V, [*b, n, f, d].
      outer: U, [*b, n, d, f].
      inner_momentum: S of V, or None without momentum.
      outer_momentum: S of U, or None without momentum.
    """

    inner: Float[Array, "*b n f d"]
    outer: Float[Array, "*b n d f"]
    inner_momentum: Float[Array, "*b n f d"] | None
    outer_momentum: Float[Array, "*b n d f"] | None


class Documents(NamedTuple):
    """Where documents begin inside a sequence; the momenta begin at zero there.

    Attributes:
      begins: whether each chunk is the first of a document, [*b, N]; the last one may be short.
      inner: V at a document's start, [*b, n, f, d].
      outer: U at a document's start, [*b, n, d, f].
    """

    begins: Bool[Array, "*b N"]
    inner: Float[Array, "*b n f d"]
    outer: Float[Array, "*b n d f"]


class Tokens(NamedTuple):
    """What a group is fed: its context, or with a `Readout` what it makes its context from.

    Attributes:
      queries: read with the last memory, [*b, d, T]; None reads nothing.
      keys: [*b, d, T]; with a readout the inputs of the key, learning-rate and decay memories.
      values: [*b, d, T]; with a readout the inputs of the value memory.
      learning_rate: inner learning rates [*b, T]; None with a readout, which makes them.
      decay: fraction kept, in (0, 1], [*b, T]; None with a readout.
      momentum: momentum coefficients in [0, 1], [*b, T], or None.
    """

    queries: Float[Array, "*b d T"] | None
    keys: Float[Array, "*b d T"]
    values: Float[Array, "*b d T"]
    learning_rate: Float[Array, "*b T"] | None
    decay: Float[Array, "*b T"] | None
    momentum: Float[Array, "*b T"] | None


class Readout(NamedTuple):
    """How learning rate and decay are read from what their memories say: sigmoid(w . M(x) + b).

    Attributes:
      learning_rate: w of the learning rate, [*b, d].
      decay: w of the decay gate, [*b, d].
      learning_rate_bias: [*b].
      decay_bias: [*b].
    """

    learning_rate: Float[Array, "*b d"]
    decay: Float[Array, "*b d"]
    learning_rate_bias: Float[Array, "*b"]
    decay_bias: Float[Array, "*b"]


class Rule(NamedTuple):
    """Which update a chunk makes (spec C6.5).

    Attributes:
      objective: "l2" (halved) or "dot".
      values: "self" (each memory generates its own target from the values) or "shared".
      dgd: which matrices erase along their input: "layerwise", "input_only", "none", "functional".
      erase: "clipped" (`eta / max(1, eta |x|^2)`) or "implicit" (`eta / (1 + eta |x|^2)`).
      inner_clip: bound on the norm of each token's inner error, and of its gradient with respect to
        each matrix; None for no bound.
      read: "running_prev", "running" or "anchor".
      max_learning_rate: upper bound of a generated learning rate.
      adaptive_query: whether the last but one memory generates the queries, from the queries.
    """

    objective: str = "l2"
    values: str = "self"
    dgd: str = "layerwise"
    erase: str = "clipped"
    inner_clip: float | None = 1.0
    read: str = "running_prev"
    max_learning_rate: float = 1.0
    adaptive_query: bool = False


class Written(NamedTuple):
    """One chunk's context for a group, heads first: keys, values [H, d, C], gates [H, C]."""

    keys: Float[Array, "H d C"]
    values: Float[Array, "H d C"]
    learning_rate: Float[Array, "H C"]
    decay: Float[Array, "H C"]
    momentum: Float[Array, "H C"] | None


class Reads(NamedTuple):
    """Every memory of a group applied to an input of its own, at the chunk's start.

    Attributes:
      inputs: z, [H, n, d, C].
      before: V z, [H, n, f, C].
      out: z + U s(V z), [H, n, d, C].
    """

    inputs: Float[Array, "H n d C"]
    before: Float[Array, "H n f C"]
    out: Float[Array, "H n d C"]
