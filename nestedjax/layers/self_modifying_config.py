"""A self-modifying memory's configuration: what is written, how fast, and from which start."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nestedjax.fields import Count, Heads, Positive, Range, check_fields
from pallas_kernels.mlp_memory import Rule, check_kernel, check_rule

Logit = Annotated[float, Range(-80, 80)]  # beyond, a sigmoid is 0 or 1 in float32
Inside = Annotated[float, Range(1e-6, 1 - 1e-6)]  # where a sigmoid can start
MEMORIES = ("key", "learning_rate", "decay", "value", "memory")


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """What one token writes into a memory (spec C6.5).

    No learning rate makes a memory run away where each token's gradient is clipped; or else where U
    alone is written (or the memory is linear) and its error is clipped, or is toward a target of
    norm one by "dot", "delta" or l2 with the clipped erasure of U. Others run away at some rate up
    to 1: l2 without erasure or clip, implicit erasure with l2, targets that are generated or shared
    without a clip, and V written without a clip or by "delta" (spec C6.12).

    Attributes:
      objective: inner objective: "l2" (halved) or "dot", whose gradients are those of the chunk's
        start, or "delta": l2 at the weights of the moment, so that a write corrects its error once.
        V, whose gradient at the moment has no parallel form, takes that of the chunk's start.
      values: "self" (each memory generates its own target) or "shared" (the generated value).
      targets: "generated", or "unit": a generated target is divided by its norm, without which
        a memory that is written at rates near 1 runs away.
      written: "both" matrices of an MLP, or "outer": U alone. Then V stays at its start.
      dgd: which matrices erase along their input: "layerwise" (R1), "input_only" (R2),
        "output_only" (U), "none" (R3) or "functional" (R4). With "delta" U is erased by the
        objective: "none" or "input_only".
      erase: "clipped" (`eta / max(1, eta |x|^2)`) or "implicit" (`eta / (1 + eta |x|^2)`).
      step: "gradient", or "normalised": U's learning rate is divided by |h|^2 + 0.01, so that it is
        the fraction of the error that one write corrects (normalised LMS).
      inner_clip: bound on the norm of each token's inner error, and of its gradient with respect to
        each matrix: a memory that has grown is written no faster; None for no bound.
      clip: what `inner_clip` bounds: "both", the "error" or the "gradient".
      decay_to: what a decay below 1 pulls the weights to: "zero", or their learned "start".
    """

    objective: Literal["l2", "dot", "delta"] = "l2"
    values: Literal["self", "shared"] = "self"
    targets: Literal["generated", "unit"] = "generated"
    written: Literal["both", "outer"] = "both"
    dgd: Literal["layerwise", "input_only", "output_only", "none", "functional"] = "layerwise"
    erase: Literal["clipped", "implicit"] = "clipped"
    step: Literal["gradient", "normalised"] = "gradient"
    inner_clip: Positive | None = 1.0
    clip: Literal["both", "error", "gradient"] = "both"
    decay_to: Literal["zero", "start"] = "zero"

    def __post_init__(self):
        check_fields(self)
        check_rule(self.rule(), linear=False, momentum=False)

    def rule(self, **others) -> Rule:
        """The rule of the kernels' package, with the choices that the memory itself makes."""
        return Rule(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **others)


@dataclasses.dataclass(frozen=True)
class SelfModifyingConfig:
    """A self-modifying memory.

    Attributes:
      heads: independent heads.
      head_dim: d, width of keys, values and queries.
      hidden: f, hidden width of each MLP memory; linear ones have none.
      chunk_size: tokens between two writes of the queried memory.
      projection_chunk_size: tokens between two writes of the others; None for `chunk_size`. One
        must divide the other.
      architecture: "mlp" (M(z) = z + U s(V z)), "linear" (M(z) = U z, from the identity) or
        "residual_linear" (M(z) = z + U z, from U = 0).
      rule: what a token writes.
      momentum: whether writes go through an inner momentum.
      read: "running_prev" (the state before the token), "running" or "anchor" (the chunk's start).
      adaptive_query: whether a sixth memory generates the queries.
      static: memories that are never written, of "key", "learning_rate", "decay", "value",
        "query" and "memory": slow weights like any other.
      max_learning_rate: upper bound of the inner learning rates.
      learning_rate_start: the share of it that the queried memory's learning rate starts near; None
        for 1 / (C + 1), and for all memories if the others have none of their own.
      projection_learning_rate: the share that the learning rate of the other memories starts near:
        one of their own, read from the same memory. None for the one of the queried memory.
      inner_scale: V ~ N(0, inner_scale^2 / d) at the start.
      gate_gain: what the read-outs of learning rates and decay are multiplied by. They see d
        numbers of norm one: sqrt(d) makes them learn like a projection of the block's input. They
        are drawn that much smaller, so that gates start alike.
      convolution: "input": one over the layer's input, or "streams": one each over queries, keys
        and values, as in Titans: a key that holds the token before needs one that the value has
        not.
      inputs: keys and values in front of the memories: "scaled" (by d^-1/2), "unit", or "silu":
        unit vectors of silu(x), as in DeltaNet, and queries of silu(x).
      output_gate: what the normalised reads are multiplied by: "silu" (of W x), "sigmoid"
        (2 sigmoid(W x), which starts near one) or "none", as in the paper.
      decay_bias: logit of the decay gate at the start. Writes along one of d directions grow a
        memory by about eta / d a token; a gate that forgets faster than that erases it for good,
        since M = identity, both matrices zero, is a fixed point (but for a decay to the start).
    """

    heads: Heads = 2
    head_dim: Count = 64
    hidden: Count = 64
    chunk_size: Count = 16
    projection_chunk_size: Count | None = None
    architecture: Literal["mlp", "linear", "residual_linear"] = "mlp"
    rule: RuleConfig = RuleConfig()
    momentum: bool = True
    read: Literal["running_prev", "running", "anchor"] = "running_prev"
    adaptive_query: bool = False
    static: tuple[str, ...] = ()
    max_learning_rate: Positive = 1.0
    learning_rate_start: Inside | None = None
    projection_learning_rate: Inside | None = None
    inner_scale: Positive = 1.0
    gate_gain: Positive = 1.0
    convolution: Literal["input", "streams"] = "input"
    inputs: Literal["scaled", "unit", "silu"] = "scaled"
    output_gate: Literal["silu", "sigmoid", "none"] = "silu"
    decay_bias: Logit = 9.0

    def __post_init__(self):
        check_fields(self)
        sizes = self.chunk_sizes
        if max(sizes) % min(sizes):
            raise ValueError(
                f"chunk_size={sizes[0]} and projection_chunk_size={sizes[1]}: one must divide the "
                "other; change either"
            )
        check_rule(rule_of(self, {}), linear=self.linear, momentum=self.momentum)
        for name in self.static:
            if name not in self.memories:
                raise ValueError(
                    f"static={self.static!r} names {name!r}; the memories are"
                    f" {', '.join(self.memories)}"
                )

    @property
    def chunk_sizes(self) -> tuple[int, int]:
        """Tokens between two writes: (queried memory, the others)."""
        return self.chunk_size, self.projection_chunk_size or self.chunk_size

    @property
    def memories(self) -> tuple[str, ...]:
        """The names of the adaptive memories."""
        return (*MEMORIES, "query") if self.adaptive_query else MEMORIES

    @property
    def generating(self) -> tuple[str, ...]:
        """The memories that generate the queried one's context, in their order in the state."""
        return (*self.memories[:4], *self.memories[5:])

    @property
    def gates(self) -> tuple[str, ...]:
        """The gates that the memories make for themselves."""
        own = () if self.projection_learning_rate is None else ("projection_learning_rate",)
        return ("learning_rate", "decay", *own)

    @property
    def linear(self) -> bool:
        """Whether memories are matrices."""
        return self.architecture != "mlp"

    @property
    def two_levels(self) -> bool:
        """Whether the queried memory is a level of its own: by its period or its learning rate."""
        return len(set(self.chunk_sizes)) == 2 or self.projection_learning_rate is not None

    def check_kernel(self, implementation: str) -> None:
        """Refuse what a kernel does not have.

        Raises:
          NotImplementedError: with the setting and what to use instead.
        """
        if implementation == "xla":
            return
        if self.two_levels:
            queried, others = self.chunk_sizes
            what = f"projection_learning_rate={self.projection_learning_rate}"
            if queried != others:
                what = f"chunk_size={queried} and projection_chunk_size={others}"
            raise NotImplementedError(
                f"implementation={implementation!r} has one chunk size and one learning rate for"
                f" all memories, got {what}; use implementation='xla'"
            )
        if implementation != "reference":
            check_kernel(rule_of(self, {}, self.memories), implementation, linear=self.linear)


def init_params(key: Array, config: SelfModifyingConfig) -> dict:
    """Slow parameters: the meta-learned initial state of each memory and the gates' read-outs.

    Each memory starts near the identity: V ~ N(0, 1/d), U ~ N(0, 0.09/f). U is not exactly zero, so
    that V has a gradient from the first token on, and large enough that its norm stays within a
    factor of 5 over long contexts. Linear memories start as the identity.

    Returns:
      `{name: {"inner": [H, f, d], "outer": [H, d, f]}}` for each memory (linear ones have "outer"
      alone), and `"readout"` with `learning_rate`, `decay` [H, d] and `learning_rate_bias`,
      `decay_bias` [H]; with a learning rate of the projections' own, `projection_learning_rate` and
      its bias, too.
    """
    heads, d, f = config.heads, config.head_dim, config.hidden
    keys = jax.random.split(key, 2 * len(config.memories) + 2)
    params: dict = {}
    for index, name in enumerate(config.memories):
        if config.linear:
            start = jnp.zeros((d, d)) if config.architecture == "residual_linear" else jnp.eye(d)
            params[name] = {"outer": jnp.tile(start[None], (heads, 1, 1))}
            continue
        inner = jax.random.normal(keys[2 * index], (heads, f, d)) / math.sqrt(d)
        params[name] = {
            "inner": inner * config.inner_scale,
            "outer": jax.random.normal(keys[2 * index + 1], (heads, d, f)) * (0.3 / math.sqrt(f)),
        }
    share = config.learning_rate_start
    logit = -math.log(config.chunk_size) if share is None else _logit(share)
    spread = 1 / (math.sqrt(d) * config.gate_gain)
    readout = {
        "learning_rate": jax.random.normal(keys[-2], (heads, d)) * spread,
        "decay": jax.random.normal(keys[-1], (heads, d)) * spread,
        "learning_rate_bias": jnp.full((heads,), logit),  # by default sigmoid = 1 / (C + 1)
        "decay_bias": jnp.full((heads,), config.decay_bias),
    }
    if config.projection_learning_rate is not None:
        own = jax.random.normal(jax.random.fold_in(keys[-2], 1), (heads, d)) * spread
        readout["projection_learning_rate"] = own
        logit = _logit(config.projection_learning_rate)
        readout["projection_learning_rate_bias"] = jnp.full((heads,), logit)
    return {**params, "readout": readout}


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def rule_of(
    config: SelfModifyingConfig, switches: Mapping[str, str], names: tuple[str, ...] = ()
) -> Rule:
    """The rule of a group of memories in the words of the kernels' package.

    Args:
      config: of the memories.
      switches: `{memory: switch}`.
      names: of the memories in the group, in the order of its state.
    """
    frozen = {*config.static, *(n for n, switch in switches.items() if switch == "frozen")}
    return config.rule.rule(
        read=config.read,
        max_learning_rate=config.max_learning_rate,
        gate_gain=config.gate_gain,
        adaptive_query=config.adaptive_query,
        residual=config.architecture != "linear",
        static=tuple(i for i, name in enumerate(names) if name in frozen),
        silent=tuple(i for i, n in enumerate(names) if switches.get(n) == "not_written"),
    )
