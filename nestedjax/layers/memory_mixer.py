"""Any level over `memory.Tokens` as a sequence mixer."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from nestedjax import levels
from nestedjax.layers import gates
from nestedjax.layers.boxes import slow
from nestedjax.layers.convolution import CausalConv
from nestedjax.layers.layer import Layer
from nestedjax.layers.linear import Linear
from nestedjax.layers.parameters import Sizes, residual_scale
from nestedjax.layers.recompute import save_products
from nestedjax.layers.watched import GateRange, Watched
from nestedjax.layers.window_attention import positions, rotary
from nestedjax.levels import Box, Level
from nestedjax.levels.describe import count, size
from nestedjax.memory import Tokens
from nestedjax.sharding import constrain, each_device, over_batch

PyTree = Any
STREAMS = ("queries", "keys", "values")


@dataclasses.dataclass(frozen=True, eq=False)
class _Functions:
    """What a mixer keeps that has no weights; it hashes by identity, as a level does not hash."""

    level: Level
    one: Level
    maps: Mapping[str, gates.FeatureMap]
    boxes: Callable[[PyTree], list[Box]] | None
    watched: Watched | None = None


def _check(config: Sizes, level: Level, shape: gates.Heads, projected, out: bool) -> None:
    """Refuse what would be ignored, or fail far from its cause."""
    if config.implementation != "xla" and level.whole is None:
        raise ValueError(
            f"implementation={config.implementation!r}, but the level {level.name!r} has no kernel:"
            " make it with implementation=config.implementation, or use implementation='xla'"
        )
    unknown = sorted({*projected} - {*STREAMS})
    if unknown:
        raise ValueError(f"projected names {unknown[0]!r}; the streams are {', '.join(STREAMS)}")
    for name, wide in (("key_dim", shape.key_dim), ("value_dim", shape.value_dim)):
        streams = [n for n in STREAMS if (n == "values") == (name == "value_dim")]
        cut = [n for n in streams if n not in projected]
        if (cut or (name == "value_dim" and not out)) and shape.heads * wide != config.width:
            raise ValueError(
                f"heads={shape.heads} of {name}={wide} are not width={config.width}: without a"
                " projection the mixer's input and output are cut into heads as they are"
            )


def require_switches(level: Level) -> None:
    """Refuse a level whose memories cannot be switched.

    Raises:
      ValueError: it says nothing of its memories.
    """
    if level.switched is None or not level.memories:
        raise ValueError(
            f"the memories of the level {level.name!r} cannot be switched: give it `memories` and"
            " `switched` (see nestedjax.levels.Level)"
        )


def _without_writes(level: Level) -> Level:
    """The level whose memories all stay at their start: what is erased would be memory, too."""
    require_switches(level)
    assert level.switched is not None
    return level.switched({name: "frozen" for name in level.memories})


class MemoryMixer(Layer):
    """Projections, a memory that is written at every token and read by queries, output projection.

        q, k, v = map(conv(W x)) for every head;  learning_rate, decay, ... = gates(x)
        o = the memory's reads;  y = W_out output(o, x)

    The memory is any level over one head's `memory.Tokens`; the clock is `levels.run`, for every
    sequence of the batch. What fills the slots is on the menu in `nestedjax.layers.gates`.

    Args:
      config: the model's configuration: width, layers, dtype, remat, implementation.
      level: over the `Tokens` of one head; or of all heads, if not `per_head`.
      heads: how many memories.
      key_dim: features of a key and of a query.
      value_dim: features of a value; None for `key_dim`.
      queries: feature map of the queries; `keys` and `values` alike.
      conv: width in tokens of a causal convolution on each projected stream, or 0.
      input_conv: width in tokens of a causal convolution on the mixer's input, or 0; the output
        gate sees the input without it.
      rotary_base: base of rotary positions on queries and keys, after their maps; None for none.
      projected: the streams that have a projection; another is the input, cut into heads.
      learning_rate: gate; None for a level that makes its own. `decay`, `momentum` and `threshold`
        alike, for levels that have them.
      output: norm and gate of the reads.
      out: whether there is an output projection.
      start: the slow parameters of the level, which begins from them in every context.
      per_head: whether the level is of one head.
      boxes: `boxes(carry) -> boxes` of the memory itself, given the `Carry` of one sequence (arrays
        or shapes); None: what `levels.describe` says of the level, for every head.
      watched: the level for `models.watched`, if it makes its own gates; it is not `per_head`.
      rngs: where the weights are drawn.

    Raises:
      ValueError: `config.implementation` is a kernel and the level has none; an unknown stream;
        heads that do not make up the width where there is no projection; a level that cannot be
        switched where `config.writes` is False.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from nestedjax import layers, memory, models
      >>> config = models.DeltaNetConfig(vocab=16, width=8, layers=1, hidden=8, heads=2)
      >>> mixer = layers.MemoryMixer(
      ...     config, memory.delta_net(4, 4, chunk_size=4), heads=2, key_dim=4, conv=4,
      ...     keys=layers.gates.unit_silu, queries=layers.gates.unit_silu,
      ...     learning_rate=layers.gates.sigmoid(), rngs=nnx.Rngs(0))
      >>> y, state = mixer(jnp.ones((1, 6, 8)))
      >>> y.shape
      (1, 6, 8)
    """

    name = "memory"

    def __init__(
        self,
        config: Sizes,
        level: Level,
        *,
        heads: int,
        key_dim: int,
        value_dim: int | None = None,
        queries: gates.FeatureMap = gates.identity,
        keys: gates.FeatureMap = gates.identity,
        values: gates.FeatureMap = gates.identity,
        conv: int = 0,
        input_conv: int = 0,
        rotary_base: float | None = None,
        projected: tuple[str, ...] = STREAMS,
        learning_rate: gates.Maker | None = None,
        decay: gates.Maker | None = None,
        momentum: gates.Maker | None = None,
        threshold: gates.Maker | None = None,
        output: gates.Maker = gates.norm(),  # noqa: B008
        out: bool = True,
        start: gates.Maker = gates.empty(),  # noqa: B008
        per_head: bool = True,
        boxes: Callable[[PyTree], list[Box]] | None = None,
        watched: Watched | None = None,
        rngs: nnx.Rngs,
    ):
        shape = gates.Heads(heads, key_dim, value_dim or key_dim)
        _check(config, level, shape, projected, out)
        if not config.writes:
            level = _without_writes(level)
            if watched is not None:
                watched = watched._replace(level=_without_writes(watched.level))
        self.heads, self.dtype, self.remat = shape, config.dtype, config.remat
        self.skipped = False  # see `models.switched`
        self.watching = False  # see `models.watched`
        self.width, self.implementation = config.width, config.implementation
        self.rotary_base = rotary_base
        self.functions = _Functions(
            level=levels.per_head(level) if per_head else level,
            one=level,
            maps={"queries": queries, "keys": keys, "values": values},
            boxes=boxes,
            watched=watched,
        )
        self.input_conv = nnx.data(None)
        if input_conv:
            shape_in = (config.width,)
            self.input_conv = CausalConv(input_conv, shape_in, ("embed",), dtype=config.dtype)
        self.projections = nnx.data({n: self._projection(config, n, rngs) for n in projected})
        convolved = projected if conv else ()
        self.convolutions = nnx.data({n: self._convolution(conv, n) for n in convolved})
        names = ("learning_rate", "decay", "momentum", "threshold")
        makers = dict(zip(names, (learning_rate, decay, momentum, threshold), strict=True))
        made = {n: make(config, shape, rngs=rngs) for n, make in makers.items() if make is not None}
        for slot, gate in made.items():
            gates.check_slot(slot, gate)
        self.gates = nnx.data(made)
        self.start = start(config, shape, rngs=rngs)
        self.output = output(config, shape, rngs=rngs)
        self.out = self._out(config, rngs) if out else nnx.data(None)

    def _size(self, stream: str) -> tuple[int, int]:
        """Heads and features of a stream."""
        wide = self.heads.value_dim if stream == "values" else self.heads.key_dim
        return self.heads.heads, wide

    def _projection(self, config: Sizes, stream: str, rngs: nnx.Rngs) -> Linear:
        return Linear(
            (config.width,),
            self._size(stream),
            ("embed", "heads", "head_dim"),
            dtype=config.dtype,
            rngs=rngs,
        )

    def _out(self, config: Sizes, rngs: nnx.Rngs) -> Linear:
        inner = self._size("values")
        return Linear(
            inner,
            (config.width,),
            ("heads", "head_dim", "embed"),
            dtype=config.dtype,
            rngs=rngs,
            scale=residual_scale(config.layers),
        )

    def _convolution(self, width: int, stream: str) -> CausalConv:
        return CausalConv(width, self._size(stream), ("heads", "head_dim"), dtype=self.dtype)

    def init_state(self, batch: int) -> dict:
        """The state at the start of a context: the memory's `Carry`, convolutions, position."""
        x = jnp.zeros((1, 1, self.width), self.dtype)
        tokens, _ = self._tokens(x, self._held(1), None, None)
        one = jax.tree.map(lambda leaf: leaf[0], tokens)
        carry = levels.start(self._level, self.start(), one)
        many = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (batch, *a.shape)), carry)
        state = {"memory": over_batch(many), **self._held(batch)}
        return {**state, "gates": self._ranges(batch)} if self.watching else state

    @property
    def _level(self) -> Level:
        """The level that runs: where gates are watched, one that returns its own."""
        watched = self.functions.watched
        return watched.level if self.watching and watched else self.functions.level

    def _ranges(self, batch: int) -> dict[str, GateRange]:
        """The ranges of the gates before the first token."""
        nothing = GateRange.start(batch, self.heads.heads)
        own = self.functions.watched.gates if self.functions.watched else ()
        return {name: nothing for name in (*self.gates, *own)}

    def _held(self, batch: int) -> dict:
        """What the mixer itself holds at the start of a context."""
        convolutions: dict = {n: conv.init_state(batch) for n, conv in self.convolutions.items()}
        if self.input_conv is not None:
            convolutions["input"] = self.input_conv.init_state(batch)
        held: dict = {"conv": convolutions} if convolutions else {}
        if self.rotary_base is not None:
            held["position"] = constrain(jnp.zeros((batch,), jnp.int32), "batch")
        return held

    def __call__(
        self,
        x: Float[Array, "B T d"],
        state: dict | None = None,
        *,
        resets: Bool[Array, "B T"] | None = None,
        written: Float[Array, "B T d"] | None = None,
    ) -> tuple[Float[Array, "B T d"], dict]:
        """Read and write T more tokens; see `Layer`.

        Args:
          x: normalised activations.
          state: from `init_state` or an earlier call; None at the start of a context.
          resets: True at the first token of a new document.
          written: what keys, values and gates are made of where it is not x, such as what
            attention said about the same tokens; not with `input_conv`.
        """
        before, after = self._tokens, self._outputs
        if self.remat == "tokens":
            before, after = save_products(before), save_products(after)
        if written is not None and self.input_conv is not None:
            raise ValueError("written= goes around input_conv; leave one of them out")
        held = {n: a for n, a in state.items() if n not in ("memory", "gates")} if state else None
        tokens, held = before(x, held or self._held(x.shape[0]), resets, written)
        reads, carry = self._remember(state["memory"] if state else None, tokens, resets)
        if self.watching:
            gates = {name: getattr(tokens, name) for name in self.gates}
            if self.functions.watched is not None:
                reads, own = reads
                gates |= own
            ranges = state["gates"] if state else self._ranges(x.shape[0])
            held["gates"] = {name: ranges[name].plus(gate) for name, gate in gates.items()}
        y = after(x, reads.astype(x.dtype))
        return (jnp.zeros_like(y) if self.skipped else y), {"memory": carry, **held}

    def switched(self, how: Mapping[str, str]) -> None:
        """Switch memories of the level: what `models.switched` does to a copy of the mixer.

        Args:
          how: `{memory: switch}`, as `levels.Level.switched` takes it.

        Raises:
          ValueError: the level cannot be switched, or has no such memory or switch.
          NotImplementedError: it runs in a kernel.
        """
        require_switches(self.functions.one)
        one, level = (f.switched(how) for f in (self.functions.one, self.functions.level))  # type: ignore[misc]
        same = self.functions.level is self.functions.one
        watched = self.functions.watched
        if watched is not None and watched.level.switched is not None:
            watched = watched._replace(level=watched.level.switched(how))
        self.functions = dataclasses.replace(
            self.functions, one=one, level=one if same else level, watched=watched
        )

    def _tokens(self, x, held: dict, resets, written) -> tuple[Tokens, dict]:
        """What the memory is given, [B, T, H, ...], and what the mixer holds afterwards."""
        after: dict = {}
        if self.convolutions or self.input_conv is not None:
            after["conv"] = {}
        if self.input_conv is not None:
            x, after["conv"]["input"] = self.input_conv(x, held["conv"]["input"], resets=resets)
        source = x if written is None else written
        streams = {}
        for name in STREAMS:
            y = x if name == "queries" else source
            if name in self.projections:
                y = self.projections[name](y)
            else:
                y = y.reshape(*y.shape[:2], *self._size(name))
            if name in self.convolutions:
                conv = self.convolutions[name]
                y, after["conv"][name] = conv(y, held["conv"][name], resets=resets)
            streams[name] = self.functions.maps[name](y)
        if self.rotary_base is not None:
            position = positions(held["position"], x.shape[1], resets)
            for name in ("queries", "keys"):
                streams[name] = rotary(streams[name], position, theta=self.rotary_base)
            after["position"] = position[:, -1] + 1
        return Tokens(**streams, **{n: gate(source) for n, gate in self.gates.items()}), after

    def _remember(self, carry, tokens: Tokens, resets) -> tuple[Any, levels.Carry]:
        """The memory of every sequence over its tokens."""
        level = self._level

        def every(params, carry, tokens, resets):
            return levels.run_batch(level, params, carry, tokens, reset=resets)

        args = (self.start(), carry, tokens, resets)
        together = self.implementation == "xla" and not levels.takes_turns(tokens)
        if together or jax.sharding.get_abstract_mesh().empty:
            return every(*args)
        # The compiler splits neither a kernel nor a loop over sequences: every device runs it on
        # its own sequences and heads.
        heads, of_tokens = P("batch", "heads"), P("batch", None, "heads")
        if level is not self.functions.one:  # `levels.per_head`: every array has the heads in front
            axes = (P("heads"), heads, of_tokens, P("batch"))
            return each_device(every, args, axes, (of_tokens, heads))
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), tokens)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args[0])
        whole = levels.carry_axes(
            jax.eval_shape(partial(levels.start, level), shapes, one),
            state=heads,
            tokens=of_tokens,
            sequence=P("batch"),
        )
        before = whole if isinstance(carry, levels.Carry) else heads
        axes = (P("heads"), before, of_tokens, P("batch"))
        return each_device(every, args, axes, (of_tokens, whole))

    def _outputs(self, x, reads) -> Array:
        """What the memory's reads add to the residual stream."""
        reads = self.output(reads, x)
        return reads.reshape(x.shape) if self.out is None else self.out(reads)

    def boxes(self, state: dict) -> list[Box]:
        """The boxes of the layer; `state` as `init_state(1)` returns it (arrays or shapes)."""
        return [
            slow("projections", *self.projections.values(), self.out),
            slow("gates", *self.gates.values()),
            slow(
                "convolutions",
                self.input_conv,
                *self.convolutions.values(),
                state=state.get("conv", ()),
            ),
            *self.output.boxes(),
            *self.start.boxes(),
            *self._memory_boxes(state["memory"]),
        ]

    def _memory_boxes(self, carry) -> list[Box]:
        """The boxes of the memory: those of one head's level, for all heads and layers."""
        own = self.functions.boxes
        if own is not None:
            return own(carry)
        level = self.functions.one
        about = {"objective": "", "rule": "", "transfer": "param"} | dict(level.about or {})
        words = (about["objective"], about["rule"], about["transfer"])
        state = carry.state
        return [Box(level.name, level.period, count(state), size(state), *words)]
