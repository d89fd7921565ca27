"""HOPE: self-modifying Titans followed by a continuum memory (paper eq. 94-97, spec E)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from nestedjax import levels
from nestedjax.levels import Box
from nestedjax.mixers.self_modifying import Inputs, init_params, self_modifying
from nestedjax.models.blocks import REMAT_POLICIES
from nestedjax.models.boxes import count, size, slow
from nestedjax.models.cms import ContinuumMemory
from nestedjax.models.config import HopeConfig
from nestedjax.models.layers import (
    CausalConv,
    Linear,
    RMSNorm,
    param,
    residual_scale,
    weight,
    weight_dtype,
)
from nestedjax.sharding import each_device, over_batch

_AXES = {
    "inner": ("heads", "hidden", "head_dim"),
    "outer": ("heads", "head_dim", "hidden"),
    "learning_rate": ("heads", "head_dim"),
    "decay": ("heads", "head_dim"),
    "learning_rate_bias": ("heads",),
    "decay_bias": ("heads",),
}


class SelfModifyingLayer(nnx.Module):
    """norm, convolution, slow projections, the self-modifying memory, gate, output projection.

    With `config.literal` (one head as wide as the model, nothing projected but the query): x + o.

    Args:
      config: the model's configuration.
      rngs: where the weights are drawn.
    """

    def __init__(self, config: HopeConfig, *, rngs: nnx.Rngs):
        width, dtype, memory = config.width, config.dtype, config.memory
        if memory.heads * memory.head_dim != width and config.literal:
            raise ValueError(
                f"the literal form needs heads * head_dim = width, got {memory.heads} *"
                f" {memory.head_dim} and {width}"
            )
        heads, axes = (memory.heads, memory.head_dim), ("embed", "heads", "head_dim")
        self.config, self.dtype, self.remat = memory, dtype, config.remat
        self.how = config.implementation
        self.norm = RMSNorm((width,), ("embed",), dtype=dtype)
        self.conv = CausalConv(4, width, dtype=dtype)

        def project(scale: float = 1.0) -> Linear:
            # unit-variance maps: the memories expect inputs of order one
            unit = scale / (0.02 * math.sqrt(width))
            return Linear((width,), heads, axes, dtype=dtype, rngs=rngs, scale=unit)

        self.query = project()
        self.key = None if config.literal else project()
        self.value = None if config.literal else project()
        self.gate = None if config.literal else project()
        momentum = Linear((width,), heads[:1], axes[:2], dtype=dtype, rngs=rngs)
        self.momentum = momentum if memory.momentum else None
        initial = init_params(rngs.params(), memory)
        wide = weight_dtype(dtype)
        self.memories = nnx.data(
            {
                name: {leaf: param(value.astype(wide), *_AXES[leaf]) for leaf, value in of.items()}
                for name, of in initial.items()
            }
        )
        back = ("heads", "head_dim", "embed")
        scale = residual_scale(config.layers) / (0.02 * math.sqrt(width))
        out = Linear(heads, (width,), back, dtype=dtype, rngs=rngs, scale=scale)
        self.head_norm = None if config.literal else RMSNorm(heads, axes[1:], dtype=dtype)
        self.out = None if config.literal else out

    def params(self) -> dict:
        """The slow parameters of the memory as plain arrays."""
        return jax.tree.map(weight, self.memories, is_leaf=lambda x: isinstance(x, nnx.Param))

    def init_state(self, batch: int) -> dict:
        """The state at the start of a context."""
        level, params = self_modifying(self.config), self.params()
        one = jnp.zeros((1, self.config.heads, self.config.head_dim), self.dtype)
        logits = one[..., 0] if self.config.momentum else None
        carry = levels.start(level, params, Inputs(one, one, one, logits))
        many = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (batch, *a.shape)), carry)
        return {"memory": over_batch(many), "conv": self.conv.init_state(batch)}

    def __call__(
        self, x: Float[Array, "B T d"], state: dict | None, *, resets: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T d"], dict]:
        """Read and write T more tokens; state None at the start of a context."""
        before, after = self._inputs, self._outputs
        if self.remat == "tokens":
            before, after = _save_products(before), _save_products(after)
        past = state["conv"] if state else self.conv.init_state(x.shape[0])
        inputs, conv = before(x, past, resets)
        o, carry = self._remember(state["memory"] if state else None, inputs, resets)
        return after(x, o.astype(x.dtype)), {"memory": carry, "conv": conv}

    def _remember(self, carry, inputs: Inputs, resets) -> tuple[Array, levels.Carry]:
        """The memory of every sequence over its tokens."""
        level = self_modifying(self.config, implementation=self.how)

        def every(params, carry, inputs, resets):
            def one(carry, x, reset):
                start = level.init(params) if carry is None else carry
                return levels.run(level, params, start, x, reset=reset)

            return jax.vmap(one)(carry, inputs, resets)

        args = (self.params(), carry, inputs, resets)
        if self.how == "xla":
            return every(*args)
        weights, tokens = P("batch", "heads"), P("batch", None, "heads")
        whole = levels.Carry(weights, tokens, P("batch"))  # type: ignore[arg-type]
        axes = (
            P("heads"),
            whole if isinstance(carry, levels.Carry) else weights,
            tokens,
            P("batch"),
        )
        return each_device(every, args, axes, (tokens, whole))

    def _inputs(self, x, past, resets) -> tuple[Inputs, Array]:
        """What the memory is given, and the convolution's state."""
        u, conv = self.conv(self.norm(x), past, resets=resets)
        as_heads = u.reshape(*u.shape[:2], -1, self.config.head_dim) if self.key is None else u
        # Of norm one, as the keys are: a memory that is written at keys and asked for its own value
        # at v, far outside of them, moves its target further than itself and runs away.
        unit = self.config.head_dim**-0.5
        inputs = Inputs(
            self.query(u),
            as_heads if self.key is None else self.key(u) * unit,
            as_heads if self.value is None else self.value(u) * unit,
            None if self.momentum is None else self.momentum(u),
        )
        return inputs, conv

    def _outputs(self, x, o) -> Array:
        """What the memory's reads add to the residual stream."""
        if self.out is None or self.head_norm is None or self.gate is None:
            return x + o.reshape(x.shape)
        return x + self.out(self.head_norm(o) * jax.nn.silu(self.gate(self.norm(x))))

    def boxes(self, state: dict) -> list[Box]:
        """The boxes of the layer; `state` as `init_state(1)` returns it (arrays or shapes)."""
        projections, memory = self._groups(state["memory"].state)
        names = [f"{name} memory" for name in self.config.memories if name != "memory"]
        queried, others = self.config.chunk_sizes
        starts = {name: of for name, of in self.memories.items() if name != "readout"}
        return [
            slow("projections", self.query, self.key, self.value, self.gate, self.out),
            slow("momentum gate", self.momentum),
            slow("convolutions", self.conv, state=state["conv"]),
            slow("norms", self.norm, self.head_norm),
            Box("memory starts", None, count(starts), 0, "next token", "", "init"),
            Box(
                "memory gates", None, count(self.memories["readout"]), 0, "next token", "", "param"
            ),
            *levels.describe(
                [
                    *self._memory_boxes(projections, names, others, "gen_context"),
                    *self._memory_boxes(memory, ["memory"], queried, "param"),
                ],
                dependencies=self._memory_order(names),
            ),
        ]

    def _groups(self, state):
        """The fast weights (shapes) of the projection memories and of the queried one."""
        if len(set(self.config.chunk_sizes)) == 2:
            return tuple(carry.state for carry in state)

        def part(where: slice):
            return jax.tree.map(
                lambda leaf: jax.eval_shape(lambda a: a[..., where, :, :], leaf), state
            )

        return part(slice(None, -1)), part(slice(-1, None))

    def _memory_boxes(self, weights, names, period, transfer) -> list[Box]:
        """One box for each memory of a group and one for the momentum of all of them."""
        rule = "gradient" if self.config.dgd == "none" else "delta gradient"
        objective, fast = self.config.objective, (weights.inner, weights.outer)
        parameters, space = count(fast) // len(names), size(fast) // len(names)
        boxes = [Box(name, period, parameters, space, objective, rule, transfer) for name in names]
        momentum = (weights.inner_momentum, weights.outer_momentum)
        if not self.config.momentum:
            return boxes
        what, rule = f"momentum of {names[-1]}", "gradient with decay"
        if len(names) > 1:
            what = "momentum of the others"
        dot = "dot with the gradient"
        return [
            *boxes,
            Box(what, period, count(momentum), size(momentum), dot, rule, "gen_context"),
        ]

    def _memory_order(self, names) -> dict[str, list[str]]:
        """What each memory needs: its context from the others, its step from its momentum."""
        if not self.config.momentum:
            return {"memory": names}
        others = {name: ["momentum of the others"] for name in names}
        return {"memory": [*names, "momentum of memory"], **others}


def _save_products(function):
    """Recompute what is cheap in the backward pass: all but products with slow weights."""
    return jax.checkpoint(function, policy=REMAT_POLICIES["dots"])


class HopeBlock(nnx.Module):
    """One block of HOPE: the self-modifying memory, then the continuum memory."""

    names = ("memory", "cms")

    def __init__(self, config: HopeConfig, *, rngs: nnx.Rngs):
        self.memory = SelfModifyingLayer(config, rngs=rngs)
        self.cms = ContinuumMemory(
            config.cms, config.width, config.layers, dtype=config.dtype, rngs=rngs
        )

    def init_state(self, batch: int) -> dict:
        """The state at the start of a context."""
        return self.memory.init_state(batch)

    def mix(
        self, x: Float[Array, "B T d"], state: dict | None, *, resets: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T d"], dict]:
        """The self-modifying memory over the sequence."""
        return self.memory(x, state, resets=resets)

    def feed(self, x: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        """The continuum memory on each token."""
        return self.cms(x)

    def boxes(self, state: dict) -> list[Box]:
        """The boxes of the block; `state` as `init_state(1)` returns it (arrays or shapes)."""
        return [*self.memory.boxes(state), *self.cms.boxes()]
