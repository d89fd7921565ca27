"""The menu of writes of a self-modifying memory: each choice changed alone, from four memories.

A part of `memory_norms`, and the table of the tests that every choice of the menu passes.
"""

import dataclasses

from nestedjax import models
from nestedjax.layers import RuleConfig, SelfModifyingConfig
from pallas_kernels.mlp_memory import CHOICES

PUBLISHED = "published"  # the write of the paper with what keeps it bounded: all defaults
BASES = ("hope_nano", "hope_linear_nano", "hope_nano_literal", PUBLISHED)
OF_RULE = {field.name for field in dataclasses.fields(RuleConfig)}
MENU: dict[str, tuple] = {
    **{name: choices for name, choices in CHOICES.items() if name in OF_RULE},
    "inner_clip": (None, 1.0),
    "architecture": ("mlp", "linear", "residual_linear"),
    "momentum": (False, True),
    "adaptive_query": (False, True),
    "static": ((), ("key",), ("learning_rate",), ("decay",), ("value",), ("memory",)),
    "learning_rate_start": (None, 0.5, 0.999),
    "projection_learning_rate": (None, 0.05, 0.5),
}


def base(name: str, heads: int = 2, head_dim: int = 16) -> SelfModifyingConfig:
    """The memory of a preset, or the published one in the sizes of `hope_nano`, but small."""
    memory = models.PRESETS["hope_nano" if name == PUBLISHED else name].memory
    sizes = {"heads": min(heads, memory.heads), "head_dim": head_dim, "hidden": head_dim}
    if name == PUBLISHED:
        return SelfModifyingConfig(chunk_size=memory.chunk_size, **sizes)
    return dataclasses.replace(memory, **sizes)


def changed(memory: SelfModifyingConfig, **settings) -> SelfModifyingConfig:
    """The memory with settings of its own or of its rule."""
    rule = {name: settings.pop(name) for name in [*settings] if name in OF_RULE}
    rule = dataclasses.replace(memory.rule, **rule)
    return dataclasses.replace(memory, rule=rule, **settings)


def menu(memory: SelfModifyingConfig) -> dict[str, SelfModifyingConfig]:
    """`{choice: memory}`: as it is, then with every choice of the menu that it does not have."""
    rows = {"as it is": memory}
    for name, choices in MENU.items():
        own = getattr(memory.rule if name in OF_RULE else memory, name)
        for choice in choices:
            if choice != own and not without_effect(memory, name, choice):
                settings = {name: choice} | needed(memory, name, choice)
                words = ", ".join(f"{n} {_word(v)}" for n, v in settings.items())
                rows[words] = changed(memory, **settings)
    return rows


def without_effect(memory: SelfModifyingConfig, name: str, choice) -> bool:
    """Whether it is about a matrix V that the memory does not have, or does not write."""
    if name == "dgd" and choice in ("input_only", "output_only"):  # here "none" and "layerwise"
        return memory.linear or memory.rule.written == "outer"
    return memory.linear and (name in ("written", "step") or choice == "functional")


def bounded(memory: SelfModifyingConfig) -> bool:
    """Whether no inner learning rate in (0, 1] makes a memory run away (spec C6.12).

    Either each token's gradient is clipped, so that its write has a norm of at most the rate; or
    the input of what is written does not move (linear memories, or U of an MLP alone), and the
    errors do not grow with the weights: they are clipped, or the target has norm one and what the
    memory says already is left out ("dot"), is of the weights of the moment ("delta"), or is erased
    as strongly as it is written ("l2" with the clipped erasure of U). With "delta" a step that is
    not normalised needs an input with eta |h|^2 < 2, too, as the presets' starts have it.
    """
    rule, errors = memory.rule, False
    clip = None if rule.inner_clip is None or rule.objective == "delta" else rule.clip
    if clip in ("both", "gradient"):
        return True
    if clip == "error":
        errors = True
    elif rule.values == "self" and rule.targets == "unit":
        small = memory.linear or rule.step == "normalised" or memory.inner_scale <= 1
        erased = rule.dgd in ("layerwise", "output_only") and rule.erase == "clipped"
        errors = {"dot": True, "delta": small, "l2": erased}[rule.objective]
    return errors and (memory.linear or rule.written == "outer")


def needed(memory: SelfModifyingConfig, name: str, choice) -> dict:
    """What has to change with a choice for it to be defined, and to have an effect."""
    rule, more = memory.rule, {}
    if name == "objective" and choice == "delta" and rule.dgd != "input_only":
        more["dgd"] = "none"
    if name in ("dgd", "inner_clip", "clip", "erase") and rule.objective == "delta":
        more["objective"] = "l2"  # "delta" erases by itself, and U's error is not clipped
    if name == "erase" and rule.dgd == "none":
        more["dgd"] = "layerwise"
    if name == "clip" and rule.inner_clip is None:
        more["inner_clip"] = 1.0
    if name == "momentum" and choice and rule.decay_to == "start":
        more["decay_to"] = "zero"
    if name == "decay_to" and choice == "start":
        more["momentum"] = False
    return {n: v for n, v in more.items() if v != getattr(rule, n, getattr(memory, n, None))}


def _word(choice) -> str:
    return "+".join(choice) if isinstance(choice, tuple) else str(choice)
