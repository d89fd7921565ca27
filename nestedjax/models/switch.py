"""Switching parts of a built model: what a trained model relies on, by name, for any model.

| part | name | switches |
|---|---|---|
| a memory | its own: "key", "delta_net" | "not_written", "frozen", "reset" |
| the memories that generate a queried one's context | "projections" | the same |
| all memories, blocks that learn in context among them | "memories" | the same, "skipped" |
| a mixer with memories | that of its level: "self_modifying" | "skipped" |
| a continuum block | "cms.0", ...; all: "cms" | "skipped"; in context those of a memory, too |
| convolutions | "convolutions"; each: "convolutions.keys" | "skipped" |

"not_written": the write term is zero; decay and erasure act. "frozen": it stays at its start.
"reset": it is back there after every period. "skipped": it adds nothing to the residual stream; a
convolution passes its input on. Blocks are stacked, so that a switch holds for all layers.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from nestedjax.errors import near
from nestedjax.layers import ContinuumMemory, MemoryMixer
from nestedjax.layers.convolution import CausalConv
from nestedjax.layers.memory_mixer import require_switches
from nestedjax.layers.watched import GateRange
from nestedjax.levels import SWITCHES
from nestedjax.models.build import Model
from nestedjax.models.in_context import InContextModel

PyTree = Any
Path = tuple[Any, ...]
SKIPPED = "skipped"


class Action(NamedTuple):
    """One thing that a switch does to a model.

    Attributes:
      path: of the module in the model.
      part: what of the module: a memory, a block's index or label, or None for all of it.
      switch: how it is switched.
    """

    path: Path
    part: str | int | None
    switch: str


Table = dict[tuple[str, str], tuple[Action, ...]]  # (name, switch) -> what it does


def switches(model: Model) -> list[tuple[str, str]]:
    """The names and switches of a model, as `switched` takes them.

    Raises:
      ValueError: a level of the model cannot be switched.

    Example:
      >>> from nestedjax import models
      >>> model = models.abstract(lambda: models.create("deltanet_nano"))
      >>> models.switches(model)[:2]
      [('delta_net', 'not_written'), ('delta_net', 'frozen')]
    """
    return list(table(model))


def switched(model: Model, how: Mapping[str, str]) -> Model:
    """A copy of a model with parts of it switched; weights are shared.

    Args:
      model: of any kind, abstract or not; it is not changed.
      how: name -> switch, both as in `switches`. Where `config.writes` is False, memories stay at
        their start whatever their switch.

    Raises:
      ValueError: an unknown name or switch, or a level that cannot be switched.
      NotImplementedError: the model's memories run in a kernel.

    Example:
      >>> from nestedjax import models
      >>> model = models.abstract(lambda: models.create("hope_nano"))
      >>> still = models.switched(model, {"projections": "frozen", "convolutions": "skipped"})
    """
    known = table(model, refuse=any(switch in SWITCHES for switch in how.values()))
    actions: list[Action] = []
    for name, switch in how.items():
        if (name, switch) not in known:
            raise ValueError(_unknown(name, switch, known))
        actions += known[name, switch]
    copy = nnx.merge(*nnx.split(model))
    modules: dict[Path, Any] = dict(_modules(copy))
    memories: dict[Path, dict[str, str]] = {}
    for path, part, switch in actions:
        module = modules[path]
        if switch in SWITCHES and not model.config.writes:
            switch = "frozen"  # as it is: no switch makes such a memory move
        if isinstance(module, InContextModel):
            module.switches = tuple({**dict(module.switches), str(part): switch}.items())
        elif isinstance(module, ContinuumMemory):
            module.skipped += (int(part or 0),)
        elif switch == SKIPPED:
            module.skipped = True
        else:
            memories.setdefault(path, {})[str(part)] = switch
    for path, changes in memories.items():
        modules[path].switched(changes)
    return copy


def table(model: Model, *, refuse: bool = True) -> Table:
    """Every name and switch of a model, and what it does; equal entries are equal models.

    Args:
      model: of any kind, abstract or not.
      refuse: a model with a level that cannot be switched.

    Raises:
      ValueError: there is such a level.
    """
    modules = list(_modules(model))
    found: Table = {}
    mixers = [(path, m) for path, m in modules if isinstance(m, MemoryMixer)]
    groups: dict[str, list[Action]] = {}
    for path, mixer in mixers:
        level = mixer.functions.one
        if refuse:
            require_switches(level)
        for memory in level.memories:
            _add(found, memory, SWITCHES, path, memory)
            if "memory" in level.memories and memory != "memory":
                groups.setdefault("projections", []).append(Action(path, memory, ""))
            groups.setdefault("memories", []).append(Action(path, memory, ""))
    blocks: Table = {}
    for path, learner in modules:
        if isinstance(learner, InContextModel):
            for label in learner.learning:
                _add(blocks, label, SWITCHES, path, label)
                groups.setdefault("memories", []).append(Action(path, label, ""))
    for name, actions in groups.items():
        for switch in SWITCHES:
            every = tuple(action._replace(switch=switch) for action in actions)
            found[name, switch] = (*found.get((name, switch), ()), *every)
    for path, mixer in mixers:
        _add(found, mixer.functions.one.name, (SKIPPED,), path)
    for path, _ in mixers:
        _add(found, "memories", (SKIPPED,), path)
    for path, cms in modules:
        if isinstance(cms, ContinuumMemory):
            for index in range(len(cms.levels)):
                _add(blocks, f"cms.{index}", (SKIPPED,), path, index)
                _add(blocks, "cms", (SKIPPED,), path, index)
    return {**found, **_by_name(blocks), **_convolutions(modules)}


def watched(model: Model) -> Model:
    """A copy of a model whose state also tells how far each gate of its memories went.

    Args:
      model: of any kind; weights are shared.

    Returns:
      The model; `gate_ranges` reads its state.
    """
    copy = nnx.merge(*nnx.split(model))
    for _, module in _modules(copy):
        if isinstance(module, MemoryMixer):
            module.watching = True
    return copy


def gate_ranges(model: Model, state: PyTree) -> dict[tuple[str, str], tuple[float, float, float]]:
    """The least, mean and largest value of each gate, over tokens, heads and layers.

    Args:
      model: from `watched`.
      state: of it, after at least one token.

    Returns:
      `{(level, gate): (least, mean, most)}`.
    """
    base = model.base if isinstance(model, InContextModel) else model
    names = [
        module.functions.one.name
        for block in base.blocks
        for _, module in _modules(block)
        if isinstance(module, MemoryMixer)
    ]
    kept: list[Mapping[str, GateRange]] = []
    _collect(state, kept)
    found: dict[tuple[str, str], list[GateRange]] = {}
    for name, ranges in zip(names, kept[-len(names) :] if names else (), strict=True):
        for gate, reached in ranges.items():
            found.setdefault((name, gate), []).append(reached)
    return {key: _summary(ranges) for key, ranges in found.items()}


def memory_starts(model: Model) -> dict[str, list[Any]]:
    """The weights that memories begin from, by the names of the memories.

    Args:
      model: of any kind.

    Returns:
      `{name: arrays}`: of each memory; of a level with memories of other names; of each continuum
      block that learns in context. What gates are read out with is no start.
    """
    found: dict[str, list[Any]] = {}
    for _, module in _modules(model):
        if isinstance(module, MemoryMixer):
            level = module.functions.one
            for path, weight in nnx.to_flat_state(nnx.state(module.start, nnx.Param)):
                own = [part for part in path if part in level.memories]
                if "readout" not in path:
                    found.setdefault(own[0] if own else level.name, []).append(weight[...])
        if isinstance(module, InContextModel):
            for _, weight in nnx.to_flat_state(nnx.state(module, nnx.Param)):
                label = weight.get_metadata("group")
                if label in module.learning:
                    found.setdefault(label, []).append(weight[...])
    return found


def _modules(model: Any) -> Iterator[tuple[Path, Any]]:
    """The parts of a model that can be switched, in one order whatever their attributes' order."""
    kinds = (MemoryMixer, CausalConv, ContinuumMemory, InContextModel)
    every = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, kinds)]
    return iter(sorted(every, key=lambda found: tuple(map(str, found[0]))))


def _add(found: Table, name: str, how: tuple[str, ...], path: Path, part: Any = None) -> None:
    """Put a part under a name, beside those that have it already."""
    for switch in how:
        found[name, switch] = (*found.get((name, switch), ()), Action(path, part, switch))


def _by_name(blocks: Table) -> Table:
    """The switches of each block together."""
    names = sorted({name for name, _ in blocks})
    return {key: blocks[key] for name in names for key in blocks if key[0] == name}


def _convolutions(modules: list[tuple[Path, Any]]) -> Table:
    """All convolutions, and each by what it convolves, if they are several."""
    found: Table = {}
    for path, conv in modules:
        if isinstance(conv, CausalConv):
            what = str(path[-1]).removesuffix("conv").strip("_") or "input"
            _add(found, "convolutions", (SKIPPED,), path)
            _add(found, f"convolutions.{what}", (SKIPPED,), path)
    return {} if not found else found if len(found) > 2 else dict([next(iter(found.items()))])


def _unknown(name: str, switch: str, known: Table) -> str:
    if not known:
        return f"no {name!r} to switch: the model has no memory, continuum block or convolution"
    own = [how for other, how in known if other == name]
    if own:
        return f"{name!r} has no switch {switch!r}; it has {', '.join(own)}"
    return f"no {name!r} to switch; {near(name, dict.fromkeys(name for name, _ in known))}"


def _collect(state: PyTree, kept: list[Mapping[str, GateRange]]) -> None:
    """The ranges in a state, in the order of its blocks."""
    if isinstance(state, Mapping):
        if "gates" in state:
            kept.append(state["gates"])
        for key in state:
            if key != "gates":
                _collect(state[key], kept)
    elif isinstance(state, tuple | list):
        for part in state:
            _collect(part, kept)


def _summary(ranges: list[GateRange]) -> tuple[float, float, float]:
    total = sum(float(np.sum(r.total)) for r in ranges)
    tokens = sum(float(np.sum(r.tokens)) for r in ranges)
    least, most = (
        min(float(np.min(r.least)) for r in ranges),
        max(float(np.max(r.most)) for r in ranges),
    )
    return least, total / tokens, most
