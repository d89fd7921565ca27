"""The operands that every implementation of the deep memory shares; tokens are the last axis.

`*b` stands for leading axes such as batch and heads, n for the memories of a group.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class FastWeights(NamedTuple):
    """The fast weights of a group of memories M(z) = z + U s(V z), in at least float32.

    Attributes:
      inner: V, [*b, n, f, d]; None for linear memories, M(z) = U z or z + U z, whose f is d.
      outer: U, [*b, n, d, f].
      inner_momentum: S of V, or None without momentum.
      outer_momentum: S of U, or None without momentum.
    """

    inner: Float[Array, "*b n f d"] | None
    outer: Float[Array, "*b n d f"]
    inner_momentum: Float[Array, "*b n f d"] | None
    outer_momentum: Float[Array, "*b n d f"] | None


class Documents(NamedTuple):
    """Where documents begin inside a sequence; the momenta begin at zero there.

    Attributes:
      begins: whether each chunk is the first of a document, [*b, N]; the last one may be short.
      inner: V at a document's start, [*b, n, f, d], or None.
      outer: U at a document's start, [*b, n, d, f].
    """

    begins: Bool[Array, "*b N"]
    inner: Float[Array, "*b n f d"] | None
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
    """How learning rate and decay are read from what their memories say: sigmoid(g w . M(x) + b).

    g is the rule's `gate_gain`.

    Attributes:
      learning_rate: w of the learning rate, [*b, d].
      decay: w of the decay gate, [*b, d].
      learning_rate_bias: [*b].
      decay_bias: [*b].
      projection_learning_rate: w of a learning rate of their own for the memories that generate,
        [*b, d], or None; not in `mlp_memory`, which has one for all.
      projection_learning_rate_bias: [*b], or None.
    """

    learning_rate: Float[Array, "*b d"]
    decay: Float[Array, "*b d"]
    learning_rate_bias: Float[Array, "*b"]
    decay_bias: Float[Array, "*b"]
    projection_learning_rate: Float[Array, "*b d"] | None = None
    projection_learning_rate_bias: Float[Array, "*b"] | None = None


class Rule(NamedTuple):
    """Which update a chunk makes (spec C6.5). The first choice of each is the paper's.

    Attributes:
      objective: "l2" (halved, gradient at the chunk's start), "dot", or "delta": l2 at the weights
        of the moment. There the erasure is the prediction's part of the gradient, so that an error
        is corrected once, as the delta rule does; V, which has no such form, takes the l2 gradient.
      values: "self" (each memory generates its own target from the values) or "shared".
      targets: "generated", or "unit": a generated target is divided by its norm.
      written: "both", or "outer": U alone is written, erased and decays. V stays at its start.
      dgd: which matrices erase along their input: "layerwise", "input_only", "output_only" (U),
        "none" or "functional".
      erase: "clipped" (`eta / max(1, eta |x|^2)`) or "implicit" (`eta / (1 + eta |x|^2)`).
      step: "gradient", or "normalised": U's learning rate is divided by |h|^2 + 0.01, so that it is
        the fraction of the error that a write corrects (normalised LMS); V's input has norm one.
      inner_clip: bound on norms, see `clip`; None for no bound.
      clip: of each token, "both", or only the inner "error", or only the "gradient" with respect to
        each matrix.
      decay_to: "zero", or "start": `W_0 + decay (W - W_0)`; not with momentum.
      read: "running_prev", "running" or "anchor".
      max_learning_rate: upper bound of a generated learning rate.
      gate_gain: what the read-outs of learning rate and decay are multiplied by.
      adaptive_query: whether the last but one memory generates the queries, from the queries.
      residual: whether linear memories are M(z) = z + U z; others always have the residual.
      static: places in the group of memories that stay as they are.
      silent: places of memories whose write term is zero; they decay and erase.
    """

    objective: str = "l2"
    values: str = "self"
    targets: str = "generated"
    written: str = "both"
    dgd: str = "layerwise"
    erase: str = "clipped"
    step: str = "gradient"
    inner_clip: float | None = 1.0
    clip: str = "both"
    decay_to: str = "zero"
    read: str = "running_prev"
    max_learning_rate: float = 1.0
    gate_gain: float = 1.0
    adaptive_query: bool = False
    residual: bool = True
    static: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()


class Written(NamedTuple):
    """One chunk's context for a group, heads first: keys, values [H, d, C], gates [H, C].

    `projection_learning_rate` is that of the memories that generated it, where it is another one.
    """

    keys: Float[Array, "H d C"]
    values: Float[Array, "H d C"]
    learning_rate: Float[Array, "H C"]
    decay: Float[Array, "H C"]
    momentum: Float[Array, "H C"] | None
    projection_learning_rate: Float[Array, "H C"] | None = None


class Reads(NamedTuple):
    """Every memory of a group applied to an input of its own, at the chunk's start.

    Attributes:
      inputs: z, [H, n, d, C].
      before: V z, [H, n, f, C]; None for linear memories.
      out: z + U s(V z), [H, n, d, C].
    """

    inputs: Float[Array, "H n d C"]
    before: Float[Array, "H n f C"] | None
    out: Float[Array, "H n d C"]
