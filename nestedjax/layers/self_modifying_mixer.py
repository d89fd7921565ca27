"""Self-modifying Titans as a sequence mixer: `MemoryMixer` around five memories a head."""

import jax
from flax import nnx

from nestedjax import levels
from nestedjax.layers import gates
from nestedjax.layers.memory_mixer import MemoryMixer
from nestedjax.layers.parameters import Sizes, is_param, param, weight, weight_dtype
from nestedjax.layers.self_modifying import self_modifying
from nestedjax.layers.self_modifying_config import SelfModifyingConfig, init_params
from nestedjax.layers.watched import Watched
from nestedjax.levels import Box
from nestedjax.levels.describe import count, size
from nestedjax.optim import MatrixAxes
from pallas_kernels.mlp_memory import FastWeights

_AXES = {
    "inner": ("heads", "hidden", "head_dim"),
    "outer": ("heads", "head_dim", "hidden"),
    "learning_rate": ("heads", "head_dim"),
    "projection_learning_rate": ("heads", "head_dim"),
    "decay": ("heads", "head_dim"),
    "learning_rate_bias": ("heads",),
    "projection_learning_rate_bias": ("heads",),
    "decay_bias": ("heads",),
}


class SelfModifyingStart(nnx.Module):
    """The slow parameters of a self-modifying memory: every memory's start, the gates' read-outs.

    Args:
      config: the model's configuration.
      memory: the self-modifying memory.
      rngs: where the weights are drawn.
    """

    def __init__(self, config: Sizes, memory: SelfModifyingConfig, *, rngs: nnx.Rngs):
        wide = weight_dtype(config.dtype)

        def slow(name: str, value: jax.Array) -> nnx.Param:
            # heads of a memory are matrices of their own, [outputs, inputs]
            matrix = MatrixAxes(-1, -2) if name in ("inner", "outer") else None
            return param(value.astype(wide), _AXES[name], matrix=matrix, weight_decay=False)

        initial = init_params(rngs.params(), memory)
        self.memories = nnx.data(
            {
                name: {leaf: slow(leaf, value) for leaf, value in of.items()}
                for name, of in initial.items()
            }
        )

    def __call__(self) -> dict:
        """The parameters as plain arrays, as `init_params` returns them."""
        return jax.tree.map(weight, self.memories, is_leaf=is_param)

    def boxes(self) -> list[Box]:
        """What the memories begin from, and the read-outs of the gates."""
        starts = {name: of for name, of in self.memories.items() if name != "readout"}
        readout = count(self.memories["readout"])
        return [
            Box("memory starts", None, count(starts), 0, "next token", "", "init"),
            Box("memory gates", None, readout, 0, "next token", "", "param"),
        ]


def self_modifying_mixer(
    config: Sizes, memory: SelfModifyingConfig, *, literal: bool = False, rngs: nnx.Rngs
) -> MemoryMixer:
    """Convolution, slow projections, the self-modifying memory, norm and gate, output projection.

    Args:
      config: the model's configuration.
      memory: the self-modifying memory.
      literal: the printed form: one head as wide as the model, nothing projected but the query, no
        gate, the reads added to the residual stream as they are.
      rngs: where the weights are drawn.

    Raises:
      ValueError: the literal form with heads that are not as wide as the model, or with
        convolutions of streams that it does not project.
    """
    if memory.heads * memory.head_dim != config.width and literal:
        raise ValueError(
            f"the literal form needs heads * head_dim = width, got {memory.heads} *"
            f" {memory.head_dim} and {config.width}"
        )
    # Of norm one, as the keys are: with self-generated targets, values larger than the keys move
    # the target faster than the memory follows, and training diverges.
    maps = {
        "scaled": gates.identity if literal else gates.scaled(memory.head_dim**-0.5),
        "unit": gates.unit,
        "silu": gates.unit_silu,
    }
    streams = memory.convolution == "streams"
    if streams and literal:
        raise ValueError("the literal form has one convolution; set convolution to 'input'")
    return MemoryMixer(
        config,
        self_modifying(memory, implementation=config.implementation),
        heads=memory.heads,
        key_dim=memory.head_dim,
        queries=gates.silu if memory.inputs == "silu" else gates.identity,
        keys=maps[memory.inputs],
        values=maps[memory.inputs],
        conv=4 if streams else 0,
        input_conv=0 if streams else 4,
        projected=("queries",) if literal else ("queries", "keys", "values"),
        momentum=gates.sigmoid() if memory.momentum else None,
        output=_output(memory, literal),
        out=not literal,
        start=lambda config, heads, *, rngs: SelfModifyingStart(config, memory, rngs=rngs),
        per_head=False,
        watched=Watched(self_modifying(memory, watched=True), memory.gates),
        boxes=lambda carry: memory_boxes(memory, carry.state),
        rngs=rngs,
    )


def _output(memory: SelfModifyingConfig, literal: bool) -> gates.Maker:
    if literal:
        return gates.plain()
    if memory.output_gate == "none":
        return gates.norm()
    return gates.gated_norm(memory.output_gate)


def memory_boxes(config: SelfModifyingConfig, state) -> list[Box]:
    """The boxes of every memory and of the momenta, in the order of their levels.

    Args:
      config: the self-modifying memory.
      state: its fast weights (shapes), as the level's `Carry` holds them.
    """
    projections, memory = _groups(config, state)
    names = [f"{name} memory" for name in config.memories if name != "memory"]
    queried, others = config.chunk_sizes
    boxes = [
        *_group_boxes(config, projections, names, others, "gen_context"),
        *_group_boxes(config, memory, ["memory"], queried, "param"),
    ]
    return levels.describe(boxes, dependencies=_needs(config, names))


def _groups(config: SelfModifyingConfig, state) -> tuple[FastWeights, FastWeights]:
    """The fast weights (shapes) of the projection memories and of the queried one."""
    if config.two_levels:
        projections, memory = (carry.state for carry in state)
        return projections, memory

    def part(where: slice) -> FastWeights:
        return jax.tree.map(lambda leaf: jax.eval_shape(lambda a: a[..., where, :, :], leaf), state)

    return part(slice(None, -1)), part(slice(-1, None))


def _group_boxes(config, weights: FastWeights, names, period, transfer) -> list[Box]:
    """One box for each memory of a group and one for the momentum of all of them."""
    rule = "gradient" if config.rule.dgd == "none" else "delta gradient"
    rule = "delta" if config.rule.objective == "delta" else rule
    objective, fast = config.rule.objective, (weights.inner, weights.outer)
    parameters, space = count(fast) // len(names), size(fast) // len(names)
    boxes = [Box(name, period, parameters, space, objective, rule, transfer) for name in names]
    momentum = (weights.inner_momentum, weights.outer_momentum)
    if not config.momentum:
        return boxes
    what, rule = f"momentum of {names[-1]}", "gradient with decay"
    if len(names) > 1:
        what = "momentum of the others"
    dot = "dot with the gradient"
    return [*boxes, Box(what, period, count(momentum), size(momentum), dot, rule, "gen_context")]


def _needs(config: SelfModifyingConfig, names) -> dict[str, list[str]]:
    """What each memory's write needs of the same time: its momentum.

    The context of a chunk is generated by the memories of the chunk's start (eq. 86-90), so that
    the queried memory needs none of the others' states of the same time: they share a level.
    """
    if not config.momentum:
        return {}
    others = {name: ["momentum of the others"] for name in names}
    return {"memory": ["momentum of memory"], **others}
