"""The product of the menus: an associative memory as a level."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float

from nestedjax.errors import require_range
from nestedjax.levels import Level, check_switches, incremental
from nestedjax.memory.architectures import Architecture, Weights
from nestedjax.memory.features import FeatureMap, identity
from nestedjax.memory.objectives import Objective
from nestedjax.memory.parallel import delta_step, omega_step
from nestedjax.memory.retention import Retention
from nestedjax.memory.rules import Rule
from nestedjax.memory.sequential import reference_step, running_token, sequential_step
from nestedjax.memory.state import (
    TOKEN_AXES,
    Memory,
    MemoryState,
    Tokens,
    initial_state,
    prepare,
    running_start,
)
from nestedjax.memory.whole import KERNELS, Kernel, kernel_for
from pallas_kernels import check_floats

_READS = ("running_prev", "running", "anchor")
_IMPLEMENTATIONS = ("xla", "reference", *KERNELS)
Execution = Literal["delta", "omega", "sequential", "reference"]

_STEPS = {
    "delta": delta_step,
    "omega": omega_step,
    "sequential": sequential_step,
    "reference": reference_step,
}


class Plan(NamedTuple):
    """How a memory will be executed.

    Attributes:
      execution: "delta" (chunk-parallel, `pallas_kernels.delta_rule`), "omega" (chunk-parallel,
        one score matrix), "sequential" (gradients in parallel, recurrence token by token) or
        "reference" (all token by token).
      reason: one sentence.
    """

    execution: Execution
    reason: str


def plan(
    architecture: Architecture,
    objective: Objective,
    retention: Retention,
    rule: Rule,
    *,
    read: str = "running_prev",
    implementation: str = "xla",
) -> Plan:
    """Say how a combination is executed, or refuse it and say why it does not exist.

    Args:
      architecture: from the menu of architectures.
      objective: from the menu of objectives.
      retention: from the menu of retentions.
      rule: from the menu of rules.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

    Returns:
      The execution and its reason.

    Raises:
      ValueError: the combination is not defined; the message says why.
    """
    _check_choice("read", read, _READS)
    _check_choice("implementation", implementation, _IMPLEMENTATIONS)
    _check_combination(architecture, objective, retention, rule)
    if implementation == "reference":
        return Plan("reference", "asked for: the recurrence token by token, with dense gradients")
    if rule.solve:
        return Plan("sequential", f"{rule.name} solves a system with the running weights")
    if retention.shrink is not None:
        return Plan("sequential", f"{retention.name} is applied after every token's write")
    if retention.link is not None and read != "anchor":
        return Plan(
            "sequential",
            f"{retention.name} retention maps the accumulator to weights by a nonlinear link, so "
            f'a {read} read needs every token\'s weights; read="anchor" is chunk-parallel',
        )
    if rule.diagonal:
        return Plan("sequential", f"{rule.name} decays every feature of a key by itself")
    if rule.mean:
        return Plan("omega", "a mean of rank-one gradients: one score matrix a weight matrix")
    if rule.window > 1:
        return Plan("omega", "sums of rank-one gradients: one score matrix a weight matrix")
    return Plan("delta", "rank-one writes at the anchor: one delta_rule chunk a weight matrix")


def associative_memory(
    architecture: Architecture,
    objective: Objective,
    retention: Retention,
    rule: Rule,
    *,
    chunk_size: int,
    read: str = "running_prev",
    feature_map: FeatureMap = identity,
    value_map: FeatureMap = identity,
    implementation: str = "xla",
    name: str | None = None,
) -> Level:
    """An associative memory that learns to map keys to values while it is read.

    Gradients are taken at the anchor `a`, the weights at the start of the token's chunk. Each
    weight matrix follows

        W_t = W_{t-1} (decay_t I - erase_t x_t x_t^T) + S_t,
        S_t = momentum_t S_{t-1} - learning_rate_t E_t x_t^T,    E_t x_t^T = grad l(M_a(k_t), v_t)

    where the retention and the rule say which terms there are; some retentions replace the first
    line (see `nestedjax.memory.retention`). A chunk of 1 token takes every gradient at the previous
    token's weights. The chunk size is part of the function that is computed, not only its speed.

    Two implementations agree: "reference", token by token, and "xla". The latter is
    chunk-parallel for the retentions `none` and `decay` with every rule but `implicit_omega`, and
    for the retentions with a link (`kl`, `lq`, `bregman_sigmoid`) when reads are at the anchor. For
    the rest there is no exact chunk-parallel form: their recurrence goes token by token inside the
    chunk. `plan` says which it is, and why.

    Args:
      architecture: what the weights compute.
      objective: what a write minimises.
      retention: how the old weights are kept.
      rule: how gradients become writes.
      chunk_size: tokens whose gradients are taken at the same weights; the level's period.
      read: "running_prev" reads `M_{t-1}(q_t)`, "running" `M_t(q_t)`, "anchor" `M_a(q_t)`.
      feature_map: applied to keys and queries, e.g. `l2_normalise`.
      value_map: applied to values.
      implementation: "xla"; "reference"; "pallas_tpu" or "pallas_gpu": the whole chunks of a call
        run in one kernel each way, unfinished ones as steps in XLA. On a mesh the kernels run
        inside `jax.shard_map`, as a mixer sees to.
      name: of the level; by default the names of the four menu entries.

    Returns:
      A level: `params` the initial weights (a tuple of matrices, as `architecture.init` makes
      them), `x` a `Tokens`, `y` the reads [T, dv] in the dtype of the queries.

    Raises:
      ValueError: chunk_size < 1, or a combination that is not defined. When the level is traced:
        tokens that lack a field the menu entries need, bring one that they do not use, or have
        other widths than the architecture.
      NotImplementedError: a kernel for a combination that has none, with the reason.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nestedjax import memory
      >>> level = memory.associative_memory(
      ...     memory.matrix(4, 3), memory.l2(), memory.decay(), memory.delta(), chunk_size=2)
      >>> params = (jnp.zeros((3, 4)),)
      >>> x = memory.Tokens(
      ...     keys=jnp.eye(4)[:2], values=jnp.ones((2, 3)), queries=jnp.eye(4)[:2],
      ...     learning_rate=jnp.full(2, 0.5), decay=jnp.full(2, 0.9))
      >>> state, y = level.step(params, level.init(params), x)
      >>> state.weights[0].shape, y.shape
      ((3, 4), (2, 3))

    Reference: Nested Learning (arXiv 2512.24695) eqs. 86-93; Titans (arXiv 2501.00663); MIRAS
    (arXiv 2504.13173) for the menus.

    Departures:
      1. The anchor is the end of the previous chunk; the equations print the end of the present.
      2. The l2 objective is halved.
    """
    require_range("associative_memory: chunk_size", chunk_size, 1, integer=True)
    chosen = plan(
        architecture, objective, retention, rule, read=read, implementation=implementation
    )
    memory = Memory(architecture, objective, retention, rule, read, feature_map, value_map)
    default = ".".join((architecture.name, objective.name, retention.name, rule.name))
    return _level(memory, chosen.execution, chunk_size, implementation, name or default)


def _level(
    memory: Memory, execution: Execution, chunk_size: int, implementation: str, name: str
) -> Level:
    """The level of a point of the product, which can be switched."""
    execute, reset = _STEPS[execution], memory.switch == "reset"

    def init(params: Weights) -> MemoryState:
        _check_start(memory.architecture, params)
        return initial_state(memory, params)

    def step(
        params: Weights, state: MemoryState, x: Tokens
    ) -> tuple[MemoryState, Float[Array, "T dv"]]:
        # the initial weights live on in the state
        state, reads = execute(memory, state, _prepared(memory, state, x))
        return init(params) if reset else state, reads.astype(x.queries.dtype)

    def switched(how: Mapping[str, str]) -> Level:
        check_switches(how, (name,), implementation if implementation in KERNELS else "xla")
        other = memory._replace(switch=how.get(name, memory.switch))
        return _level(other, execution, chunk_size, implementation, name)

    whole = None
    if implementation in KERNELS:
        whole = _whole(memory, kernel_for(memory, implementation, chunk_size), init)
    about = {"objective": memory.objective.name, "rule": memory.rule.name, "transfer": "param"}
    level = Level(
        name,
        chunk_size,
        init,
        step,
        whole=whole,
        about=about,
        ndim=TOKEN_AXES,
        memories=(name,),
        switched=switched,
    )
    if memory.read == "anchor":
        return level._replace(token=_anchored(memory))
    return incremental(
        level, start=lambda params, state: running_start(memory, state), token=_running(memory)
    )


def _check_start(architecture: Architecture, params: Weights) -> None:
    """Refuse initial weights of another form than the architecture's."""
    if not isinstance(params, tuple):
        raise ValueError(
            f"{architecture.name} memory: initial weights are a {type(params).__name__}, "
            f"expected a tuple of {len(architecture.shapes)}: make them with "
            "architecture.init(key)"
        )
    named = {f"initial weight {i}": w for i, w in enumerate(params)}
    check_floats(f"{architecture.name} memory", **named)
    shapes = tuple(w.shape for w in params)
    if shapes != architecture.shapes:
        raise ValueError(
            f"{architecture.name} memory: initial weights have shapes {shapes}, the "
            f"architecture {architecture.shapes}; make them with architecture.init(key)"
        )


def _prepared(memory: Memory, state: MemoryState, x: Tokens) -> Tokens:
    """The tokens as the executions take them, if they are what the memory needs."""
    _check_tokens(memory, x)
    _check_shapes(memory, x, state.weights[0].dtype)
    tokens = prepare(memory, x, state.weights[0].dtype)
    _check_widths(memory, tokens)
    return tokens


def _one(x: Tokens) -> Tokens:
    """A single token with a token axis."""
    return jax.tree.map(lambda leaf: leaf[None], x)


def _anchored(memory: Memory) -> Callable[..., Array]:
    """`Level.token` of a memory that reads the chunk's start, and so nothing of the chunk."""

    def token(params: Weights, state: MemoryState, pending: Tokens, x: Tokens) -> Array:
        del params, pending
        query = _prepared(memory, state, _one(x)).queries[0]
        return memory.architecture.apply(memory.link(state.weights), query).astype(x.queries.dtype)

    return token


def _running(memory: Memory) -> Callable[..., tuple[MemoryState, Array]]:
    """What `levels.incremental` asks: the weights of the moment with one more token written."""

    def token(
        params: Weights, state: MemoryState, notes: MemoryState, x: Tokens
    ) -> tuple[MemoryState, Array]:
        del params
        notes, reads = running_token(memory, state, notes, _prepared(memory, state, _one(x)))
        return notes, reads[0].astype(x.queries.dtype)

    return token


def _whole(memory: Memory, kernel: Kernel, init: Callable[..., MemoryState]) -> Callable[..., Any]:
    """`Level.whole`: all whole chunks of a call in one kernel, which takes tokens as they are."""

    def whole(
        params: Weights, state: MemoryState, x: Tokens, begins: Array | None
    ) -> tuple[MemoryState, Array]:
        tokens, dtype = _prepared(memory, state, x), x.queries.dtype
        state, reads = kernel(init(params), state, tokens, begins, dtype)
        return state, reads.astype(dtype)

    return whole


def _check_choice(argument: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"associative_memory: {argument} is one of {choices}, got {choice!r}")


def _check_combination(
    architecture: Architecture, objective: Objective, retention: Retention, rule: Rule
) -> None:
    linear = len(architecture.shapes) == 1 and not architecture.residual
    erases = rule.erase is not None
    quadratic = retention.link is None and retention.shrink is None
    if erases and not quadratic:
        raise ValueError(
            f"{rule.name} erases by the closed form of a quadratic retention and is not defined "
            f"with {retention.name} retention; use none() or decay(), or gradient() or omega()"
        )
    if objective.deflate is not None and not linear:
        raise ValueError(
            f"the {objective.name} objective is defined on the matrix of a linear memory, not on "
            f"{architecture.name}; use matrix()"
        )
    if objective.deflate is not None and (erases or rule.functional or rule.solve):
        raise ValueError(
            f"the {objective.name} objective erases by itself; use it with gradient(), momentum() "
            f"or omega(), not with {rule.name}"
        )
    if rule.mean and retention.name != "none":
        raise ValueError(
            f"{rule.name} starts every token's weights from those of the chunk's start, which "
            f"{retention.name} retention would not keep; use none()"
        )
    if rule.solve and not (linear and objective.factor is not None and quadratic):
        raise ValueError(
            f"{rule.name} has a closed form for matrix() with l2() and none() or decay() "
            f"only, not for {architecture.name}, {objective.name}, {retention.name}; use omega()"
        )


def _check_tokens(memory: Memory, x: Tokens) -> None:
    rule = memory.rule
    decay = {"required": True, "optional": x.decay is not None, "unused": False}
    fields = (
        ("learning_rate", x.learning_rate, True, memory.rule.name),
        ("decay", x.decay, decay[memory.retention.decay], memory.retention.name),
        ("momentum", x.momentum, memory.rule.momentum, memory.rule.name),
        ("rate_offset", x.rate_offset, memory.rule.mean and x.rate_offset is not None, rule.name),
        ("threshold", x.threshold, memory.objective.token_threshold, memory.objective.name),
    )
    for field, given, needed, user in fields:
        if needed and given is None:
            raise ValueError(f"{user} needs Tokens.{field}, which is None")
        if not needed and given is not None:
            raise ValueError(f"{user} has no use for Tokens.{field}; leave it None")


def _check_shapes(memory: Memory, x: Tokens, dtype: jax.numpy.dtype) -> None:
    who = f"{memory.architecture.name} memory"
    given = {name: array for name, array in x._asdict().items() if array is not None}
    check_floats(who, **{f"Tokens.{name}": array for name, array in given.items()})
    if x.keys.ndim != 2:
        raise ValueError(
            f"{who}: keys have shape {x.keys.shape}, and a memory takes one sequence [T, dk]: give "
            "a token its axis; for a batch use levels.run_batch or jax.vmap"
        )
    length = x.keys.shape[0]
    for name, array in given.items():
        rows = name in ("keys", "values", "queries")
        if array.ndim != (2 if rows else 1) or array.shape[0] != length:
            expected = f"[{length}, features]" if rows else f"[{length}], one number for each token"
            raise ValueError(f"{who}: {name} has shape {array.shape}, expected {expected}")
        if array.dtype == jax.numpy.float64 and dtype != array.dtype:
            raise ValueError(
                f"{who}: {name} is float64 and would be rounded to the weights' {dtype}; cast it, "
                "or make the weights float64"
            )


def _check_widths(memory: Memory, tokens: Tokens) -> None:
    widths = {
        "keys": (tokens.keys.shape[-1], memory.architecture.key_dim),
        "queries": (tokens.queries.shape[-1], memory.architecture.key_dim),
        "values": (tokens.values.shape[-1], memory.architecture.value_dim),
    }
    for field, (given, expected) in widths.items():
        if given != expected:
            raise ValueError(
                f"{memory.architecture.name} memory: {field} have {given} features (after the "
                f"feature map), the architecture takes {expected}"
            )
