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
matrices uses each layer's own input. What else may be chosen is in `RuleConfig`.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax import memory
from nestedjax.layers.self_modifying_config import SelfModifyingConfig, rule_of
from nestedjax.levels import Level, check_switches, flow, incremental
from pallas_kernels import accumulation_dtype
from pallas_kernels.mlp_memory import (
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


class Generated(NamedTuple):
    """What the projection memories generate for each token, in the accumulation dtype."""

    queries: Float[Array, "T H d"]
    keys: Float[Array, "T H d"]
    values: Float[Array, "T H d"]
    learning_rate: Float[Array, "T H"]
    decay: Float[Array, "T H"]
    momentum: Float[Array, "T H"] | None
    projection_learning_rate: Float[Array, "T H"] | None = None  # where the gates are watched


def self_modifying(
    config: SelfModifyingConfig,
    *,
    remat: bool = True,
    implementation: str = "xla",
    switches: Mapping[str, str] | None = None,
    watched: bool = False,
) -> Level:
    """The self-modifying memory as a level: `memory.Tokens` of all heads in, reads [T, H, d] out.

    The tokens' keys are the inputs of the key, learning-rate and decay memories, their values those
    of the value memory; it makes its own learning rates and decays. Its period is the longer of the
    two chunk sizes and its parameters are those of `init_params`.
    Memories of one chunk size and one learning rate are one level with all of them in its state, so
    that they share what depends on keys and gates only; otherwise the queried memory and the others
    are two levels in a `levels.flow`.

    Args:
      config: see `SelfModifyingConfig`.
      remat: recompute each chunk in the backward pass; what is stored is one state per chunk and
        the largest triangular inverse in it.
      implementation: "xla" (a scan over chunks) or another one of `pallas_kernels.mlp_memory`,
        which then runs the whole chunks of a call; unfinished ones are steps in XLA.
      switches: `{memory: switch}` of "not_written" (its write term is zero), "frozen" (it stays as
        it is) or "reset" (after every chunk it is back at its start).
      watched: its outputs are `(reads, {gate: [T, H]})`, of `config.gates`; in XLA, and one token
        costs what its chunk does.

    Raises:
      ValueError: an unknown memory or switch.
      NotImplementedError: a kernel for what has none.

    Reference: Nested Learning (arXiv 2512.24695), eq. 79-93; spec C6.
    """
    switches = dict(switches or {})
    config.check_kernel(implementation)
    check_switches(switches, config.memories, implementation)
    if watched:
        implementation = "xla"
    make = _two_levels if config.two_levels else _one_level
    checkpoint = recomputed if remat else lambda step: step
    level = make(config, switches, checkpoint, implementation, watched)

    def switched(more: Mapping[str, str]) -> Level:
        return self_modifying(
            config,
            remat=remat,
            implementation=implementation,
            switches={**switches, **more},
            watched=watched,
        )

    return level._replace(memories=config.memories, switched=switched)


@dataclasses.dataclass(frozen=True)
class _Group:
    """The memories that are the state of one level, and how they are switched."""

    config: SelfModifyingConfig
    switches: Mapping[str, str]
    names: tuple[str, ...]
    watched: bool = False

    @property
    def rule(self) -> Rule:
        return rule_of(self.config, self.switches, self.names)

    def start(self, params) -> FastWeights:
        """The fast weights at the start of a context."""

        def stacked(name: str) -> Array:
            dtype = accumulation_dtype(params["memory"][name])
            return jnp.stack([params[n][name].astype(dtype) for n in self.names], axis=1)

        inner, outer = None if self.config.linear else stacked("inner"), stacked("outer")
        if not self.config.momentum:
            return FastWeights(inner, outer, None, None)
        return FastWeights(inner, outer, *jax.tree.map(jnp.zeros_like, (inner, outer)))

    def decays_to(self, params) -> FastWeights | None:
        """What `rule.decay_to="start"` needs."""
        return self.start(params) if self.config.rule.decay_to == "start" else None

    def settled(self, params, weights: FastWeights) -> FastWeights:
        """The weights after a chunk, those that are reset back at their start."""
        again = [self.switches.get(name) == "reset" for name in self.names]
        if not any(again):
            return weights
        where = jnp.array(again)[None, :, None, None]
        return jax.tree.map(
            lambda new, old: jnp.where(where, new, old), self.start(params), weights
        )


def _one_level(config, switches, checkpoint, implementation, watched) -> Level:
    """All memories in one state."""
    group = _Group(config, switches, (*config.generating, "memory"), watched)
    level = Level(
        "self_modifying",
        config.chunk_size,
        group.start,
        checkpoint(lambda params, state, x: _step(params, state, x, group)),
        whole=None if implementation == "xla" else partial(_whole, group, implementation),
        ndim=_axes(),
    )
    return level if watched else _by_token(level, group, _tokens)


def _two_levels(config, switches, checkpoint, implementation, watched) -> Level:
    """The memories that generate the context, then the queried one."""
    del implementation  # checked: there is no kernel
    others = _Group(config, switches, config.generating, watched)
    queried = _Group(config, switches, ("memory",), watched)
    projections = Level(
        "projections",
        config.chunk_sizes[1],
        others.start,
        checkpoint(lambda params, state, x: _project(params, state, x, others)),
        token=lambda params, state, pending, x: _generate_one(params, state, x, others),
        ndim=_axes(),
    )
    memory = Level(
        "memory",
        config.chunk_size,
        queried.start,
        checkpoint(lambda params, state, x: _remember(params, state, x, queried)),
    )
    memory = memory if watched else _by_token(memory, queried, _written_tokens)
    both = flow(projections, memory)
    assert both.advance is not None
    advance = both.advance
    return both._replace(
        name="self_modifying",
        init=lambda params: both.init((params, params)),
        step=lambda params, state, x: both.step((params, params), state, x),
        advance=lambda params, *rest, **options: advance((params, params), *rest, **options),
    )


def _axes():
    return jax.tree.map(lambda n: n + 1, memory.TOKEN_AXES)  # all heads


def _by_token(level: Level, group: _Group, columns) -> Level:
    """The level with its queried memory read token by token in O(1).

    `columns(params, x) -> (tokens, readout)` is how it is given `x`.
    """
    rule = group.rule

    def given(params, x):
        return columns(params, jax.tree.map(lambda a: a[None], x))

    def anchored(params, state, pending, x):
        del pending  # no token of a chunk sees another
        tokens, readout = given(params, x)
        return read_anchor(state, tokens, readout, rule)[..., 0]

    def token(params, state, running, x):
        tokens, readout = given(params, x)
        start = group.decays_to(params)
        running, read = read_running(state, running, tokens, readout, rule, start)
        return running, read[..., 0]

    if rule.read == "anchor":
        return level._replace(token=anchored)
    return incremental(level, start=lambda params, state: running_start(state), token=token)


def _columns(array, dtype):
    """[T, H, d] -> [H, d, T] and [T, H] -> [H, T]: tokens last."""
    return None if array is None else jnp.moveaxis(array.astype(dtype), 0, -1)


def _tokens(params, x: memory.Tokens) -> tuple[Tokens, Readout]:
    """A chunk's inputs with tokens last, and the read-outs, in the accumulation dtype."""
    dtype = accumulation_dtype(params["memory"]["outer"])
    queries, keys, values, momentum = (
        _columns(a, dtype) for a in (x.queries, x.keys, x.values, x.momentum)
    )
    return Tokens(queries, keys, values, None, None, momentum), _readout(params, dtype)


def _readout(params, dtype) -> Readout:
    return Readout(**{name: array.astype(dtype) for name, array in params["readout"].items()})


def _step(params, weights, x: memory.Tokens, group: _Group):
    """One chunk of all memories: generate its context, write it everywhere, read."""
    tokens, readout = _tokens(params, x)
    start = group.decays_to(params)
    after, read = memory_chunk(weights, tokens, readout, group.rule, start=start)
    assert read is not None
    read, after = jnp.moveaxis(read, -1, 0), group.settled(params, after)
    if not group.watched:
        return after, read
    made = generate(weights, tokens, readout, group.rule, queried=False)
    return after, (read, _gates(group.config, _generated(*made[:2], watched=True)))


def _gates(config: SelfModifyingConfig, made: Generated) -> dict:
    """The gates that the memories made for each token, [T, H]."""
    return {name: getattr(made, name) for name in config.gates}


def _whole(group: _Group, implementation, params, weights, x: memory.Tokens, begins):
    """Many chunks of all memories in one operation, which reads its tokens in their own dtype."""
    dtype, documents = weights.outer.dtype, None
    queries, keys, values = (jnp.moveaxis(a, 0, -2) for a in (x.queries, x.keys, x.values))
    momentum = _columns(x.momentum, dtype)
    if begins is not None:
        start = group.start(params)
        begins = jnp.broadcast_to(begins, (weights.outer.shape[0], *begins.shape))
        documents = Documents(begins, start.inner, start.outer)
    out = mlp_memory(
        keys,
        values,
        queries=queries,
        momentum=momentum,
        initial=weights,
        readout=_readout(params, dtype),
        documents=documents,
        rule=group.rule,
        chunk_size=group.config.chunk_size,
        implementation=implementation,
    )
    assert out.reads is not None
    return out.final, jnp.moveaxis(out.reads, -2, 0).astype(dtype)


def _project(params, weights, x: memory.Tokens, group: _Group):
    """Generate one chunk's context, then write it into the memories that generated it."""
    tokens, readout = _tokens(params, x)
    rule, start = group.rule, group.decays_to(params)
    queries, written, _ = generate(weights, tokens, readout, rule, queried=False)
    weights, _ = write_chunk(weights, _slower(written), rule, start=start)
    return group.settled(params, weights), _generated(queries, written, watched=group.watched)


def _slower(written):
    """The context at the learning rate of the projections' own."""
    own = written.projection_learning_rate
    return written if own is None else written._replace(learning_rate=own)


def _generate_one(params, weights, x: memory.Tokens, group: _Group):
    """One token's context."""
    tokens, readout = _tokens(params, jax.tree.map(lambda a: a[None], x))
    queries, written, _ = generate(weights, tokens, readout, group.rule, queried=False)
    made = _generated(queries, written, watched=group.watched)
    return jax.tree.map(lambda a: a[0], made)


def _generated(queries, written, *, watched: bool) -> Generated:
    """The context with tokens first."""
    assert queries is not None
    made = Generated(queries, *written)
    if not watched:  # the others have been written by then
        made = made._replace(projection_learning_rate=None)
    return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), made)


def _written_tokens(params, x: Generated) -> tuple[Tokens, None]:
    """The context with tokens last; nothing is left to be read out."""
    return Tokens(*jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), x[:6])), None


def _remember(params, weights, x: Generated, group: _Group):
    """Write the chunk's context into the queried memory and read it."""
    tokens, start = _written_tokens(params, x)[0], group.decays_to(params)
    weights, read = memory_chunk(weights, tokens, None, group.rule, start=start)
    assert read is not None
    read, weights = jnp.moveaxis(read, -1, 0), group.settled(params, weights)
    return weights, (read, _gates(group.config, x)) if group.watched else read
