"""Memories whose whole chunks run in one kernel each way: which ones, and why the others do not.

| memory | kernel |
|---|---|
| `matrix()` with `dot()`, no momentum | `pallas_kernels.delta_rule`, whose writes need no anchor |
| `residual_mlp` of one hidden layer with GELU, `l2()` or `dot()` | `pallas_kernels.mlp_memory` |
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from nestedjax.memory.state import Memory, MemoryState, Tokens
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.mlp_memory import Documents, FastWeights, Rule, mlp_memory

KERNELS = ("pallas_tpu", "pallas_gpu")
# `kernel(start, state, tokens, begins, dtype) -> (state, reads)`, of all whole chunks of a call;
# its products are of numbers of that dtype
Kernel = Callable[..., tuple[MemoryState, Array]]

# Rules of `nestedjax.memory.rules` -> how `mlp_memory` calls them: dgd, erase.
_DEEP_RULES = {
    "gradient": ("none", "clipped"),
    "momentum": ("none", "clipped"),
    "delta": ("layerwise", "clipped"),
    "delta+momentum": ("layerwise", "clipped"),
    "implicit_delta": ("layerwise", "implicit"),
    "implicit_delta+momentum": ("layerwise", "implicit"),
    "input_delta": ("input_only", "clipped"),
    "functional_delta": ("functional", "clipped"),
}


def kernel_for(memory: Memory, implementation: str, chunk_size: int) -> Kernel:
    """The kernel of a memory.

    Args:
      memory: the point of the product.
      implementation: "pallas_tpu" or "pallas_gpu".
      chunk_size: the level's period, in tokens.

    Raises:
      NotImplementedError: there is none, with the reason.
    """
    architecture, rule = memory.architecture, memory.rule

    def refuse(reason: str) -> NotImplementedError:
        return NotImplementedError(
            f"implementation={implementation!r}: {reason}; use implementation='xla'"
        )

    if memory.retention.link is not None or memory.retention.shrink is not None:
        raise refuse(f"no kernel has {memory.retention.name} retention")
    if rule.window > 1 or rule.solve or rule.mean or rule.diagonal:
        raise refuse(f"no kernel has the rule {rule.name}")
    if architecture.name == "matrix":
        if architecture.scales[0]:
            raise refuse("the kernel of linear memories begins documents with an empty memory")
        if memory.objective.name != "dot" or rule.functional:
            raise refuse(
                f"the {memory.objective.name} objective takes its errors at every chunk's start, "
                "which the kernel of linear memories does not"
            )
        if rule.momentum:
            raise refuse("the kernel of linear memories begins no document with momentum")
        if memory.read == "anchor":
            raise refuse("the kernel of linear memories reads no anchor of each chunk")
        return partial(_linear, memory, implementation, chunk_size)
    deep = architecture.name == "residual_mlp" and len(architecture.shapes) == 2
    if not deep or architecture.activation is not jax.nn.gelu:
        raise refuse(f"no kernel has a memory of the form {architecture.name}")
    if memory.objective.name not in ("l2", "dot") or rule.name not in _DEEP_RULES:
        raise refuse(f"no kernel has {memory.objective.name} with {rule.name}")
    return partial(_deep, memory, implementation, chunk_size)


def _linear(
    memory: Memory,
    implementation: str,
    chunk_size: int,
    start: MemoryState,
    state: MemoryState,
    tokens: Tokens,
    begins: Array | None,
    dtype: jnp.dtype,
) -> tuple[MemoryState, Array]:
    """Every chunk of a linear memory: with the dot objective no error depends on an anchor."""
    (keys,), (errors,) = memory.factors(state.weights, tokens)
    decay = tokens.decay
    kept = jnp.ones_like(tokens.learning_rate) if decay is None else decay
    erase = memory.erase(0, tokens.learning_rate, kept, keys)
    first = None
    if begins is not None:
        first = jnp.repeat(begins, chunk_size)
        first = first & (jnp.arange(len(keys), dtype=jnp.int32) % chunk_size == 0)
        # A document's first token keeps nothing of what was before it.
        decay = jnp.where(first, 0.0, kept)
        erase = None if erase is None else jnp.where(first, 0.0, erase)
    out = delta_rule(
        keys.astype(dtype),
        errors.astype(dtype),
        memory.write(tokens.learning_rate, keys),
        initial=state.weights[0],
        decay=decay,
        erase=erase,
        queries=tokens.queries.astype(dtype),
        read=memory.read,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    reads = out.reads
    assert reads is not None
    if first is not None and memory.read == "running_prev":
        reads = jnp.where(first[:, None], 0.0, reads)
    if begins is not None:
        # Architectures that start empty are given zeros; another start would be lost in silence.
        reads = jnp.where(jnp.any(start.weights[0] != 0), jnp.nan, reads)
    return MemoryState((out.final,), None, None), reads


def _deep(
    memory: Memory,
    implementation: str,
    chunk_size: int,
    start: MemoryState,
    state: MemoryState,
    tokens: Tokens,
    begins: Array | None,
    dtype: jnp.dtype,
) -> tuple[MemoryState, Array]:
    """Every chunk of a residual MLP memory, as a group of one."""

    def group(state: MemoryState) -> FastWeights:
        inner, outer = (weights[None] for weights in state.weights)
        if state.momentum is None:
            return FastWeights(inner, outer, None, None)
        return FastWeights(inner, outer, *(momentum[None] for momentum in state.momentum))

    dgd, erase = _DEEP_RULES[memory.rule.name]
    rule = Rule(
        objective=memory.objective.name,
        values="shared",
        dgd=dgd,
        erase=erase,
        inner_clip=None,
        read=memory.read,
    )
    fresh, documents = group(start), None
    if begins is not None:
        documents = Documents(begins, fresh.inner, fresh.outer)
    out = mlp_memory(
        tokens.keys.astype(dtype),
        tokens.values.astype(dtype),
        queries=tokens.queries.astype(dtype),
        learning_rate=tokens.learning_rate,
        decay=jnp.ones_like(tokens.learning_rate) if tokens.decay is None else tokens.decay,
        momentum=tokens.momentum,
        initial=group(state),
        documents=documents,
        rule=rule,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    assert out.reads is not None and out.final.inner is not None
    weights = (out.final.inner[0], out.final.outer[0])
    final, momentum = out.final, None
    assert final.inner is not None
    if final.inner_momentum is not None and final.outer_momentum is not None:
        momentum = (final.inner_momentum[0], final.outer_momentum[0])
    return MemoryState(weights, momentum, None), out.reads
