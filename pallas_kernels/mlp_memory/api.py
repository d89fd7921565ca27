"""The public face of the deep memory: validates, picks an implementation, casts back."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._checks import check_axes, check_floats, check_integer
from pallas_kernels._linalg.derivatives import reverse_only
from pallas_kernels._linalg.numerics import accumulation_dtype
from pallas_kernels.mlp_memory.pallas_tpu import mlp_memory_pallas_tpu
from pallas_kernels.mlp_memory.reference import mlp_memory_reference
from pallas_kernels.mlp_memory.types import Documents, FastWeights, Readout, Rule, Tokens
from pallas_kernels.mlp_memory.xla import mlp_memory_xla

CHOICES = {
    "objective": ("l2", "dot", "delta"),
    "dgd": ("layerwise", "input_only", "output_only", "none", "functional"),
    "erase": ("clipped", "implicit"),
    "read": ("running_prev", "running", "anchor"),
    "values": ("self", "shared"),
    "targets": ("generated", "unit"),
    "written": ("both", "outer"),
    "step": ("gradient", "normalised"),
    "clip": ("both", "error", "gradient"),
    "decay_to": ("zero", "start"),
}
# What the kernels have of the menu; "xla" and "reference" have all of it.
KERNEL_CHOICES = {
    "objective": ("l2", "dot"),
    "dgd": ("layerwise", "input_only", "none", "functional"),
    "targets": ("generated",),
    "written": ("both",),
    "step": ("gradient",),
    "clip": ("both",),
    "decay_to": ("zero",),
    "gate_gain": (1.0,),
    "static": ((),),
    "silent": ((),),
}


def check_rule(rule: Rule, *, linear: bool, momentum: bool) -> None:
    """Refuse choices that contradict each other.

    Raises:
      ValueError: an unknown choice or a contradiction, with the value and what to take instead.
    """
    for name, choices in CHOICES.items():
        if getattr(rule, name) not in choices:
            raise ValueError(f"{name}={getattr(rule, name)!r} is not one of {', '.join(choices)}")
    if rule.objective == "delta" and rule.dgd not in ("none", "input_only"):
        raise ValueError(
            f"objective='delta' erases along U's input by itself: dgd={rule.dgd!r} would erase"
            " twice; use dgd='none', or 'input_only' for V"
        )
    if rule.decay_to == "start" and momentum:
        raise ValueError("decay_to='start' is not defined with momentum; leave out either")
    if linear and rule.dgd == "functional":
        raise ValueError("dgd='functional' is 'layerwise' for a linear memory; use that")


def check_kernel(rule: Rule, implementation: str, *, linear: bool) -> None:
    """Refuse what a kernel does not have.

    Raises:
      NotImplementedError: with the choice and what to use instead.
    """
    if linear:
        raise NotImplementedError(
            f"implementation={implementation!r} has no linear memories; use implementation='xla'"
        )
    for name, choices in KERNEL_CHOICES.items():
        if getattr(rule, name) not in choices:
            raise NotImplementedError(
                f"implementation={implementation!r} has no {name}={getattr(rule, name)!r}, only"
                f" {', '.join(map(repr, choices))}; use implementation='xla'"
            )


def _pallas_gpu(*operands, **options):
    # Mosaic GPU is imported where it is asked for: it needs absl, which jax does not require
    from pallas_kernels.mlp_memory.pallas_gpu import mlp_memory_pallas_gpu

    return mlp_memory_pallas_gpu(*operands, **options)


_IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": mlp_memory_reference,
    "xla": mlp_memory_xla,
    "pallas_tpu": mlp_memory_pallas_tpu,
    "pallas_gpu": _pallas_gpu,
}


class MemoryOutput(NamedTuple):
    """What a sequence gives back.

    Attributes:
      reads: [..., T, d] in the dtype of the keys, or None without queries.
      final: the fast weights after the last token.
    """

    reads: Float[Array, "..."] | None
    final: FastWeights


def mlp_memory(
    keys: Float[Array, "..."],
    values: Float[Array, "..."],
    *,
    initial: FastWeights,
    learning_rate: Float[Array, "..."] | None = None,
    decay: Float[Array, "..."] | None = None,
    momentum: Float[Array, "..."] | None = None,
    queries: Float[Array, "..."] | None = None,
    readout: Readout | None = None,
    documents: Documents | None = None,
    start: FastWeights | None = None,
    rule: Rule | None = None,
    chunk_size: int = 16,
    implementation: str | None = None,
) -> MemoryOutput:
    """Run a group of two-layer residual memories M(z) = z + U s(V z) over a sequence.

    At each chunk's start the inner gradients of its tokens are taken; inside the chunk every matrix
    follows the delta rule with its own layer input, and the group's last memory is read. With a
    `readout` the memories make their own context: the group is (key, learning rate, decay, value,
    memory), or with `rule.adaptive_query` (key, learning rate, decay, value, query, memory), which
    is one layer of self-modifying Titans; without one any number of memories learns the context
    that is given.

    Args:
      keys: [..., T, d]; with a readout the inputs of the key, learning-rate and decay memories.
      values: [..., T, d]; with a readout the inputs of the value memory.
      initial: fast weights at the start, leaves [..., n, f, d] and [..., n, d, f].
      learning_rate: inner learning rates, [..., T]; not with a readout.
      decay: fraction of the memory kept, in [0, 1], [..., T]; not with a readout. The chunked forms
        work with logarithms: a negative one gives nan.
      momentum: momentum coefficients in [0, 1], [..., T]; given if `initial` has momenta. The
        kernels give it, and the decay, no gradient at exactly 0; "xla" and "reference" do.
      queries: [..., T, d]; None reads nothing.
      readout: how learning rate and decay are read from the memories that make them.
      documents: where documents begin and what their memory begins as; None for one sequence that
        goes on from `initial`.
      start: the weights that `rule.decay_to="start"` decays to, as `initial`; None for `initial`.
      rule: see `Rule`; default its defaults.
      chunk_size: tokens between two writes. It changes the result: errors are those of the chunk's
        start. Tokens beyond the last whole chunk are a shorter chunk.
      implementation: "reference" (token by token), "xla" (chunk-parallel), "pallas_tpu" or
        "pallas_gpu" (the same in one kernel each way, the fast weights on the chip from the first
        chunk to the last; on a mesh only inside `jax.shard_map`) or None, which is "xla": the
        kernels have been compiled for TPUs and for Hopper GPUs and checked in interpret mode; none
        has run on one.

    Returns:
      `MemoryOutput`; fast weights in at least float32.

    Raises:
      ValueError: a shape or choice that does not fit, with its value.
      NotImplementedError: "pallas_tpu" in float64, or on a TPU that does not compile it;
        "pallas_gpu" in float64, in float32 with momentum, with `adaptive_query`, other chunks than
        of 64 tokens and matrices of other than 64 x 64; either in forward mode (`jax.jvp`).

    Reference: Nested Learning (arXiv 2512.24695) eq. 79-93; spec C6.
    """
    rule = Rule() if rule is None else rule
    _check_arrays(keys, values, initial, learning_rate, decay, momentum, queries, readout)
    gates = {"learning_rate": learning_rate, "decay": decay, "momentum": momentum}
    implementation = _check(keys, values, initial, gates, queries, readout, rule, implementation)
    check_integer("mlp_memory", "chunk_size", chunk_size, 1)
    if documents is not None:
        _check_documents(documents, initial, -(-keys.shape[-2] // chunk_size))
    if 0 in keys.shape[:-1]:
        return _unchanged(initial, keys, queries)
    given = (keys, values, initial, *gates.values(), queries, readout)
    dtype = accumulation_dtype(*jax.tree.leaves(given))
    last = partial(jnp.swapaxes, axis1=-1, axis2=-2)
    tokens = Tokens(None if queries is None else last(queries), last(keys), last(values), **gates)
    batch = initial.outer.shape[:-3]
    flat = partial(_flat, lead=len(batch))
    wide = partial(flat, dtype=dtype)
    start = initial if start is None else start
    initial, readout, start = jax.tree.map(wide, (initial, readout, start))
    if documents is not None:
        begins = flat(documents.begins, dtype=None)
        documents = Documents(begins, *jax.tree.map(wide, documents[1:]))
    # A kernel reads its tokens as they are.
    kept = None if implementation in ("pallas_tpu", "pallas_gpu") else dtype
    tokens = jax.tree.map(partial(flat, dtype=kept), tokens)
    if kept is None:
        operation = f"mlp_memory(implementation={implementation!r})"
        operands = initial, tokens, readout, documents
        initial, tokens, readout, documents = reverse_only(operands, operation)
    # Only the others have something to decay to.
    more = {} if kept is None else {"begin": start}
    run = partial(_IMPLEMENTATIONS[implementation], **more)
    reads, final = run(initial, tokens, readout, documents, rule=rule, chunk_size=chunk_size)
    final = jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), final)
    if reads is not None:
        reads = last(reads.reshape(*batch, *reads.shape[1:])).astype(keys.dtype)
    return MemoryOutput(reads, final)


def _unchanged(initial: FastWeights, keys, queries) -> MemoryOutput:
    """No tokens, or no sequences: nothing is read, and the fast weights stay as they are."""
    dtype = accumulation_dtype(*jax.tree.leaves((initial, keys)))
    final = jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), initial)
    return MemoryOutput(None if queries is None else jnp.zeros(queries.shape, keys.dtype), final)


def _flat(array, *, lead: int, dtype):
    """All leading axes as one."""
    array = array.reshape(-1, *array.shape[lead:])
    return array if dtype is None else array.astype(dtype)


def _check_documents(documents: Documents, initial: FastWeights, chunks: int) -> None:
    batch = initial.outer.shape[:-3]
    expected: dict[str, tuple] = {"begins": (*batch, chunks)}
    if initial.inner is not None:
        expected["inner"] = initial.inner.shape
    for name, shape in (expected | {"outer": initial.outer.shape}).items():
        found = getattr(documents, name)
        if (None if found is None else found.shape) != shape:
            raise ValueError(f"documents.{name} has shape {found.shape}, expected {shape}")


def _check_arrays(keys, values, initial, learning_rate, decay, momentum, queries, readout) -> None:
    """Refuse what is no array of real numbers, or has too few axes to be told apart."""
    gates = {"learning_rate": learning_rate, "decay": decay, "momentum": momentum}
    rows = {"keys": keys, "values": values, "queries": queries}
    weights = {f"initial.{n}": a for n, a in initial._asdict().items()}
    more = {} if readout is None else {f"readout.{n}": a for n, a in readout._asdict().items()}
    check_floats("mlp_memory", **rows, **gates, **weights, **more)
    for name, array in rows.items():
        check_axes("mlp_memory", name, array, "[..., T, d]", 2)
    for name, array in gates.items():
        check_axes("mlp_memory", name, array, "[..., T], one number for each token", 1)
    for name, array in weights.items():
        check_axes("mlp_memory", name, array, "[..., n, f, d] or [..., n, d, f]", 3)


def _check(keys, values, initial, gates, queries, readout, rule, implementation) -> str:
    """The implementation, if everything fits."""
    linear, momentum = initial.inner is None, initial.outer_momentum is not None
    check_rule(rule, linear=linear, momentum=momentum)
    for name, number in (
        ("inner_clip", rule.inner_clip),
        ("max_learning_rate", rule.max_learning_rate),
    ):
        if not (number is None or 0 < number < float("inf")):
            raise ValueError(f"{name}={number!r} must be a number in (0, inf)")
    implementation = "xla" if implementation is None else implementation
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r} is not one of {known}")
    if implementation.startswith("pallas"):
        check_kernel(rule, implementation, linear=linear)
    *batch, n, d, f = initial.outer.shape
    inner = None if linear else (*batch, n, f, d)
    if linear and f != d:
        raise ValueError(
            f"initial.outer has shape {initial.outer.shape}; linear memories are d x d"
        )
    expected: dict[str, tuple | None] = {"inner": inner, "inner_momentum": inner}
    expected["outer_momentum"] = initial.outer.shape
    for name, shape in expected.items():
        found = getattr(initial, name)
        if found is not None and found.shape != shape:
            raise ValueError(f"initial.{name} has shape {found.shape}, expected {shape}")
    length = keys.shape[-2]
    given = {"keys": keys, "values": values, "queries": queries}
    for name, array in given.items():
        if array is not None and array.shape != (*batch, length, d):
            raise ValueError(f"{name} has shape {array.shape}, expected {(*batch, length, d)}")
    for name, gate in gates.items():
        if gate is not None and gate.shape != (*batch, length):
            raise ValueError(f"{name} has shape {gate.shape}, expected {(*batch, length)}")
    if (gates["momentum"] is None) == momentum:
        raise ValueError("give momentum and the momenta of `initial` together, or neither")
    made = [name for name in ("learning_rate", "decay") if gates[name] is not None]
    if readout is None and len(made) < 2:
        raise ValueError(
            "learning_rate and decay are missing: give both, or a readout that makes them"
        )
    if readout is not None:
        if made:
            raise ValueError(f"a readout makes {made[0]}: leave it out, or the readout")
        needed = 6 if rule.adaptive_query else 5
        if n != needed or queries is None:
            raise ValueError(
                f"with a readout there are {needed} memories and queries, got {n} memories and "
                f"queries={None if queries is None else queries.shape}"
            )
    return implementation
