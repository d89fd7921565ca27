"""Self-modifying Titans: five memories per head that generate their own context and values.

Keys, values, inner learning rate and decay gate of every token are read from memories that the same
tokens write (paper eq. 79-93, spec C6); `memory` is the one that is queried. The projection
memories and the queried one may have different chunk sizes: then they are two levels, joined by
`levels.flow` because one generates the other's context.

Departures from the paper, all switchable: (1) queries come from a static projection unless
`adaptive_query`; (2) the gradient's anchor is the end of the previous chunk, not of the current one
(eq. 90-93 print an index that does not exist yet); (3) the inner error and the gradient of each
matrix are clipped to norm 1 and the learning rate starts near 1/C, without which training diverges
in the first steps, or in the first long context; (4) several heads; (5) the erasure of an MLP's
matrices uses each layer's own input.
"""

import dataclasses
import math
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax import memory
from nestedjax.fields import Count, Heads, Positive, Range, check_fields
from nestedjax.levels import Level, flow, incremental
from pallas_kernels import accumulation_dtype
from pallas_kernels.mlp_memory import (
    CHOICES,
    Documents,
    FastWeights,
    Readout,
    Rule,
    Tokens,
    generate,
    memory_chunk,
    mlp_memory,
    read_anchor,
    read_running,
    recomputed,
    running_start,
    write_chunk,
)

Logit = Annotated[float, Range(-80, 80)]  # beyond, a sigmoid is 0 or 1 in float32
MEMORIES = ("key", "learning_rate", "decay", "value", "memory")


@dataclasses.dataclass(frozen=True)
class SelfModifyingConfig:
    """A self-modifying memory.

    Attributes:
      heads: independent heads.
      head_dim: d, width of keys, values and queries.
      hidden: f, hidden width of each memory.
      chunk_size: tokens between two writes of the queried memory.
      projection_chunk_size: tokens between two writes of the others; None for `chunk_size`. One
        must divide the other.
      objective: inner objective, "l2" (halved) or "dot".
      dgd: which matrices erase along their input: "layerwise" (R1), "input_only" (R2), "none" (R3)
        or "functional" (R4).
      erase: "clipped" (`eta / max(1, eta |x|^2)`) or "implicit" (`eta / (1 + eta |x|^2)`).
      momentum: whether writes go through an inner momentum.
      read: "running_prev" (the state before the token), "running" or "anchor" (the chunk's start).
      values: "self" (each memory generates its own target) or "shared" (the generated value).
      adaptive_query: whether a sixth memory generates the queries.
      max_learning_rate: upper bound of the inner learning rate, which starts at
        max_learning_rate / (C + 1).
      inner_clip: bound on the norm of each token's inner error, and of its gradient with respect to
        each matrix: a memory that has grown is written no faster; None for no bound.
      decay_bias: logit of the decay gate at the start. Writes along one of d directions grow a
        memory by about eta / d a token; a gate that forgets faster than that erases it for good,
        since M = identity, both matrices zero, is a fixed point.
    """

    heads: Heads = 2
    head_dim: Count = 64
    hidden: Count = 64
    chunk_size: Count = 16
    projection_chunk_size: Count | None = None
    objective: str = "l2"
    dgd: str = "layerwise"
    erase: str = "clipped"
    momentum: bool = True
    read: str = "running_prev"
    values: str = "self"
    adaptive_query: bool = False
    max_learning_rate: Positive = 1.0
    inner_clip: Positive | None = 1.0
    decay_bias: Logit = 9.0

    def __post_init__(self):
        check_fields(self)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        sizes = self.chunk_sizes
        if max(sizes) % min(sizes):
            raise ValueError(
                f"chunk_size={sizes[0]} and projection_chunk_size={sizes[1]}: one must divide the "
                "other; change either"
            )

    @property
    def chunk_sizes(self) -> tuple[int, int]:
        """Tokens between two writes: (queried memory, the others)."""
        return self.chunk_size, self.projection_chunk_size or self.chunk_size

    @property
    def memories(self) -> tuple[str, ...]:
        """The names of the adaptive memories."""
        return (*MEMORIES, "query") if self.adaptive_query else MEMORIES


class Generated(NamedTuple):
    """What the projection memories generate for each token, in the accumulation dtype."""

    queries: Float[Array, "T H d"]
    keys: Float[Array, "T H d"]
    values: Float[Array, "T H d"]
    learning_rate: Float[Array, "T H"]
    decay: Float[Array, "T H"]
    momentum: Float[Array, "T H"] | None


def init_params(key: Array, config: SelfModifyingConfig) -> dict:
    """Slow parameters: the meta-learned initial state of each memory and the gates' read-outs.

    Each memory starts near the identity: V ~ N(0, 1/d), U ~ N(0, 0.09/f). U is not exactly zero, so
    that V has a gradient from the first token on, and large enough that its norm stays within a
    factor of 5 over long contexts.

    Returns:
      `{name: {"inner": [H, f, d], "outer": [H, d, f]}}` for each memory, and `"readout"` with
      `learning_rate`, `decay` [H, d] and `learning_rate_bias`, `decay_bias` [H].
    """
    heads, d, f = config.heads, config.head_dim, config.hidden
    keys = jax.random.split(key, 2 * len(config.memories) + 2)
    params = {}
    for index, name in enumerate(config.memories):
        params[name] = {
            "inner": jax.random.normal(keys[2 * index], (heads, f, d)) / math.sqrt(d),
            "outer": jax.random.normal(keys[2 * index + 1], (heads, d, f)) * (0.3 / math.sqrt(f)),
        }
    params["readout"] = {
        "learning_rate": jax.random.normal(keys[-2], (heads, d)) / math.sqrt(d),
        "decay": jax.random.normal(keys[-1], (heads, d)) / math.sqrt(d),
        "learning_rate_bias": jnp.full(
            (heads,), -math.log(config.chunk_size)
        ),  # sigmoid = 1 / (C + 1)
        "decay_bias": jnp.full((heads,), config.decay_bias),
    }
    return params


def self_modifying(
    config: SelfModifyingConfig, *, remat: bool = True, implementation: str = "xla"
) -> Level:
    """The self-modifying memory as a level: `memory.Tokens` of all heads in, reads [T, H, d] out.

    The tokens' keys are the inputs of the key, learning-rate and decay memories, their values those
    of the value memory; it makes its own learning rates and decays. Its period is the longer of the
    two chunk sizes and its parameters are those of `init_params`.
    Memories of one chunk size are one level with all of them in its state, so that they share what
    depends on keys and gates only; two chunk sizes are two levels in a `levels.flow`.

    Args:
      config: see `SelfModifyingConfig`.
      remat: recompute each chunk in the backward pass; what is stored is one state per chunk and
        the largest triangular inverse in it.
      implementation: "xla" (a scan over chunks) or another one of `pallas_kernels.mlp_memory`,
        which then runs the whole chunks of a call; unfinished ones are steps in XLA.

    Raises:
      NotImplementedError: an implementation other than "xla" with two chunk sizes.

    Reference: Nested Learning (arXiv 2512.24695), eq. 79-93; spec C6.
    """
    queried, others = config.chunk_sizes
    checkpoint = recomputed if remat else lambda step: step
    generating = config.memories[:4] + config.memories[5:]
    axes = jax.tree.map(lambda n: n + 1, memory.TOKEN_AXES)  # all heads
    if queried == others:
        level = Level(
            "self_modifying",
            queried,
            lambda params: _start(params, config, (*generating, "memory")),
            checkpoint(lambda params, state, x: _step(params, state, x, config)),
            whole=None if implementation == "xla" else partial(_whole, config, implementation),
            ndim=axes,
        )
        return _by_token(level, config, partial(_tokens, config=config))
    if implementation != "xla":
        raise NotImplementedError(
            f"implementation={implementation!r} takes one chunk size, got {queried} and {others}; "
            "use implementation='xla'"
        )
    projections = Level(
        "projections",
        others,
        lambda params: _start(params, config, generating),
        checkpoint(lambda params, state, x: _project(params, state, x, config)),
        token=lambda params, state, pending, x: _generate_one(params, state, x, config),
        ndim=axes,
    )
    queried_memory = Level(
        "memory",
        queried,
        lambda params: _start(params, config, ("memory",)),
        checkpoint(lambda params, state, x: _remember(params, state, x, config)),
    )
    both = flow(projections, _by_token(queried_memory, config, _written_tokens))
    assert both.advance is not None
    advance = both.advance
    return both._replace(
        name="self_modifying",
        init=lambda params: both.init((params, params)),
        step=lambda params, state, x: both.step((params, params), state, x),
        advance=lambda params, *rest, **options: advance((params, params), *rest, **options),
    )


def _by_token(level, config, columns) -> Level:
    """The level with its queried memory read token by token in O(1).

    `columns(params, x) -> (tokens, readout)` is how it is given `x`.
    """
    rule = _rule(config)

    def given(params, x):
        return columns(params, jax.tree.map(lambda a: a[None], x))

    def anchored(params, state, pending, x):
        del pending  # no token of a chunk sees another
        tokens, readout = given(params, x)
        return read_anchor(state, tokens, readout, rule)[..., 0]

    def token(params, state, running, x):
        tokens, readout = given(params, x)
        running, read = read_running(state, running, tokens, readout, rule)
        return running, read[..., 0]

    if config.read == "anchor":
        return level._replace(token=anchored)
    return incremental(level, start=lambda params, state: running_start(state), token=token)


def _start(params, config, names) -> FastWeights:
    dtype = accumulation_dtype(params["memory"]["inner"])
    inner = jnp.stack([params[name]["inner"].astype(dtype) for name in names], axis=1)
    outer = jnp.stack([params[name]["outer"].astype(dtype) for name in names], axis=1)
    if not config.momentum:
        return FastWeights(inner, outer, None, None)
    return FastWeights(inner, outer, jnp.zeros_like(inner), jnp.zeros_like(outer))


def _rule(config) -> Rule:
    return Rule(**{field: getattr(config, field) for field in Rule._fields})


def _columns(array, dtype):
    """[T, H, d] -> [H, d, T] and [T, H] -> [H, T]: tokens last."""
    return None if array is None else jnp.moveaxis(array.astype(dtype), 0, -1)


def _tokens(params, x: memory.Tokens, config) -> tuple[Tokens, Readout]:
    """A chunk's inputs with tokens last, and the read-outs, in the accumulation dtype."""
    dtype = accumulation_dtype(params["memory"]["inner"])
    queries, keys, values, momentum = (
        _columns(a, dtype) for a in (x.queries, x.keys, x.values, x.momentum)
    )
    return Tokens(queries, keys, values, None, None, momentum), _readout(params, dtype)


def _readout(params, dtype) -> Readout:
    return Readout(**{n: params["readout"][n].astype(dtype) for n in Readout._fields})


def _step(params, weights, x: memory.Tokens, config):
    """One chunk of all memories: generate its context, write it everywhere, read."""
    tokens, readout = _tokens(params, x, config)
    weights, read = memory_chunk(weights, tokens, readout, _rule(config))
    assert read is not None
    return weights, jnp.moveaxis(read, -1, 0)


def _whole(config, implementation, params, weights, x: memory.Tokens, begins):
    """Many chunks of all memories in one operation, which reads its tokens in their own dtype."""
    dtype, documents = weights.inner.dtype, None
    queries, keys, values = (jnp.moveaxis(a, 0, -2) for a in (x.queries, x.keys, x.values))
    momentum = _columns(x.momentum, dtype)
    if begins is not None:
        start = _start(params, config, (*config.memories[:4], *config.memories[5:], "memory"))
        begins = jnp.broadcast_to(begins, (weights.inner.shape[0], *begins.shape))
        documents = Documents(begins, start.inner, start.outer)
    out = mlp_memory(
        keys,
        values,
        queries=queries,
        momentum=momentum,
        initial=weights,
        readout=_readout(params, dtype),
        documents=documents,
        rule=_rule(config),
        chunk_size=config.chunk_size,
        implementation=implementation,
    )
    assert out.reads is not None
    return out.final, jnp.moveaxis(out.reads, -2, 0).astype(dtype)


def _project(params, weights, x: memory.Tokens, config):
    """Generate one chunk's context, then write it into the memories that generated it."""
    tokens, readout = _tokens(params, x, config)
    rule = _rule(config)
    queries, written, _ = generate(weights, tokens, readout, rule, queried=False)
    weights, _ = write_chunk(weights, written, rule)
    return weights, _generated(queries, written)


def _generate_one(params, weights, x: memory.Tokens, config):
    """One token's context."""
    tokens, readout = _tokens(params, jax.tree.map(lambda a: a[None], x), config)
    queries, written, _ = generate(weights, tokens, readout, _rule(config), queried=False)
    return jax.tree.map(lambda a: a[0], _generated(queries, written))


def _generated(queries, written) -> Generated:
    """The context with tokens first."""
    assert queries is not None
    return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), Generated(queries, *written))


def _written_tokens(params, x: Generated) -> tuple[Tokens, None]:
    """The context with tokens last; nothing is left to be read out."""
    return Tokens(*jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), x)), None


def _remember(params, weights, x: Generated, config):
    """Write the chunk's context into the queried memory and read it."""
    weights, read = memory_chunk(weights, *_written_tokens(params, x), _rule(config))
    assert read is not None
    return weights, jnp.moveaxis(read, -1, 0)
