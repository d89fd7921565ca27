"""The public face of the delta rule: validates, picks an implementation, casts back."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._checks import broadcast, check_axes, check_floats, check_integer
from pallas_kernels._linalg.derivatives import reverse_only
from pallas_kernels._linalg.numerics import accumulation_dtype
from pallas_kernels.delta_rule.pallas_tpu import delta_rule_pallas_tpu
from pallas_kernels.delta_rule.reference import delta_rule_reference
from pallas_kernels.delta_rule.types import DeltaOutput, Operands
from pallas_kernels.delta_rule.xla import delta_chunk_xla, delta_rule_xla

_GATES = ("learning_rate", "decay", "erase", "momentum")
_READS = ("running_prev", "running", "anchor")
_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")


def delta_rule(
    x: Float[Array, "..."],
    error: Float[Array, "..."],
    learning_rate: Float[Array, "..."],
    *,
    initial: Float[Array, "..."],
    decay: Float[Array, "..."] | None = None,
    erase: Float[Array, "..."] | None = None,
    momentum: Float[Array, "..."] | None = None,
    initial_momentum: Float[Array, "..."] | None = None,
    queries: Float[Array, "..."] | None = None,
    read: str = "running_prev",
    chunk_size: int = 64,
    implementation: str | None = None,
) -> DeltaOutput:
    """Run the delta-rule recurrence over a sequence.

    `W_t = W_{t-1}(decay_t I - erase_t x_t x_t^T) + S_t`,
    `S_t = momentum_t S_{t-1} - learning_rate_t error_t x_t^T`; without momentum `S_t` is its last
    term. A term whose operand is None is switched off at trace time and costs nothing. DeltaNet is
    `error = -values`, `erase = learning_rate`; Gated DeltaNet `erase = decay * learning_rate`;
    retention has neither erase nor momentum. Leading dimensions of size one broadcast. Without
    tokens the states come back as they are.

    The recurrence stays bounded where no transition lengthens a row of W: with `decay_t` in [0, 1]
    and `0 <= erase_t |x_t|^2 <= 1 + decay_t`, so with keys of norm at most 1 (the layers' `unit`
    maps) and `erase` in [0, 1], and always with an implicit rate `eta / (1 + eta |x|^2)`. Beyond
    that W grows by up to `|decay_t - erase_t |x_t|^2|` a token and overflows in every
    implementation alike; a chunk in which it does is not finite from its first token on, in the
    chunked forms. Nothing is clipped here.

    Args:
      x: keys, or the inputs of the weight matrix, [..., T, n].
      error: gradient with respect to the matrix's output, [..., T, m].
      learning_rate: inner learning rates, [..., T].
      initial: the memory before the first token, [..., m, n].
      decay: fraction of the memory kept, in [0, 1], [..., T]; a negative one gives nan in the
        chunked forms, which work with logarithms.
      erase: strength of the erasure along `x_t`, [..., T].
      momentum: momentum coefficients in [0, 1], [..., T]; as with decay, the kernels give it no
        gradient at exactly 0, "xla" and "reference" do.
      initial_momentum: [..., m, n]; zeros when None.
      queries: [..., T, n]; None reads nothing.
      read: "running_prev" reads `W_{t-1} q_t`, "running" `W_t q_t`, "anchor" `W_0 q_t`.
      chunk_size: tokens solved in parallel; changes the speed, not the result.
      implementation: "reference" (token by token), "xla" (chunk-parallel), "pallas_tpu" or
        "pallas_gpu" (the same in one kernel each way; on a mesh only inside `jax.shard_map`;
        derivatives in reverse mode only) or None, which is "xla": the kernels have been compiled
        for TPUs and for Hopper GPUs and checked in interpret mode; neither has run on one.

    Returns:
      `DeltaOutput(reads, final, final_momentum)`; reads in the dtype of `x`, states in at least
      float32.

    Raises:
      ValueError: a shape, dtype, read or implementation that does not fit, with its value.
      NotImplementedError: "pallas_tpu" in float64; "pallas_gpu" with momentum, in float64, with
        other chunks than of 64 tokens, and with a memory that is not 64 k x 64 or 64 k x 128;
        either in forward mode (`jax.jvp`, `jax.hessian`).

    Example:
      >>> import jax.numpy as jnp
      >>> key, value = jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0]])
      >>> out = delta_rule(key, -value, jnp.ones(1), erase=jnp.ones(1), initial=jnp.ones((2, 2)))
      >>> out.final.tolist()
      [[3.0, 1.0], [4.0, 1.0]]

    References:
      Nested Learning (arXiv 2512.24695) eq. 88-93; DeltaNet (arXiv 2406.06484) for the WY form.
    """
    implementation = _check_choices(read, implementation)
    check_integer("delta_rule", "chunk_size", chunk_size, 1)
    gates = (learning_rate, decay, erase, momentum)
    given = x, error, gates, initial, initial_momentum, queries
    operands = _prepare("delta_rule", *given)
    if operands.x.shape[-1] == 0 or 0 in operands.initial.shape[:-2]:
        return _tokens_first(_unchanged(operands), x.dtype)
    if implementation == "reference":
        out = delta_rule_reference(operands, read=read)
    elif implementation == "xla":
        out = delta_rule_xla(operands, read=read, chunk_size=chunk_size)
    elif implementation == "pallas_tpu":
        operands = reverse_only(operands, "delta_rule(implementation='pallas_tpu')")
        out = delta_rule_pallas_tpu(operands, read=read, chunk_size=chunk_size)
    else:
        # Mosaic GPU is imported where it is asked for: it needs absl, which jax does not require
        from pallas_kernels.delta_rule.pallas_gpu import delta_rule_pallas_gpu

        operands = reverse_only(operands, "delta_rule(implementation='pallas_gpu')")
        dtype = _multiplied(x, error, queries)
        out = delta_rule_pallas_gpu(operands, read=read, chunk_size=chunk_size, dtype=dtype)
    return _tokens_first(out, x.dtype)


def delta_chunk(
    x: Float[Array, "..."],
    error: Float[Array, "..."],
    learning_rate: Float[Array, "..."],
    *,
    initial: Float[Array, "..."],
    decay: Float[Array, "..."] | None = None,
    erase: Float[Array, "..."] | None = None,
    momentum: Float[Array, "..."] | None = None,
    initial_momentum: Float[Array, "..."] | None = None,
    queries: Float[Array, "..."] | None = None,
    read: str = "running_prev",
    implementation: str | None = None,
) -> DeltaOutput:
    """One chunk of `delta_rule`, solved at once: what a memory calls between two anchors.

    The arguments are those of `delta_rule` (its kernels are refused: their gain is the state that
    stays between chunks); the whole call is one chunk of T tokens, which costs
    O(T^2 (m + n) + T m n). Its stages for tokens as columns are `chunk_tables`, `solve_chunk`,
    `read_chunk` and `write_chunk`.
    """
    implementation = _check_choices(read, implementation)
    if implementation in ("pallas_tpu", "pallas_gpu"):
        raise ValueError(
            f"delta_chunk has no implementation={implementation!r}; use 'xla', or delta_rule"
        )
    gates = (learning_rate, decay, erase, momentum)
    operands = _prepare("delta_chunk", x, error, gates, initial, initial_momentum, queries)
    if operands.x.shape[-1] == 0 or 0 in operands.initial.shape[:-2]:
        return _tokens_first(_unchanged(operands), x.dtype)
    form = delta_rule_reference if implementation == "reference" else delta_chunk_xla
    return _tokens_first(form(operands, read=read), x.dtype)


def _unchanged(operands: Operands) -> DeltaOutput:
    """No tokens, or no sequences: nothing is read, and the states stay as they are."""
    reads, initial = None, operands.initial
    if operands.queries is not None:
        batch = jnp.broadcast_shapes(initial.shape[:-2], operands.queries.shape[:-2])
        tokens = operands.x.shape[-1]
        reads = jnp.zeros((*batch, initial.shape[-2], tokens), initial.dtype)
    return DeltaOutput(reads, initial, operands.initial_momentum)


def _tokens_first(out: DeltaOutput, dtype) -> DeltaOutput:
    if out.reads is None:
        return out
    return out._replace(reads=jnp.swapaxes(out.reads, -1, -2).astype(dtype))


def _multiplied(*tokens):
    """The dtype of products: bfloat16 if all tokens are, else that of `accumulation_dtype`."""
    given = [a for a in tokens if a is not None]
    if all(a.dtype == jnp.bfloat16 for a in given):
        return jnp.dtype(jnp.bfloat16)
    return accumulation_dtype(*given)


def _check_choices(read, implementation):
    if read not in _READS:
        raise ValueError(f"read={read!r} is not one of {', '.join(_READS)}")
    if implementation is None:
        return "xla"
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r} is not one of {known}")
    return implementation


def _prepare(name, x, error, gates, initial, initial_momentum, queries) -> Operands:
    """Check everything, cast to the accumulation dtype, give the states the batch's shape.

    Tokens come first and are last in the operands.
    """
    rows = {"x": x, "error": error, "queries": queries}
    states = {"initial": initial, "initial_momentum": initial_momentum}
    named = dict(zip(_GATES, gates, strict=True))
    check_floats(name, **rows, **named, **states)
    _check_shapes(name, rows, named, states)
    arrays = {n: a for n, a in (rows | named | states).items() if a is not None}
    dtype = accumulation_dtype(*arrays.values())
    leading = {n: a.shape[:-1] if n in _GATES else a.shape[:-2] for n, a in arrays.items()}
    broadcast(name, **leading)
    # More queries than memories leave the memories as many as they are.
    batch = broadcast(name, **{n: shape for n, shape in leading.items() if n != "queries"})
    arrays = {n: jnp.asarray(a).astype(dtype) for n, a in arrays.items()}
    arrays |= {n: jnp.swapaxes(arrays[n], -1, -2) for n in rows if n in arrays}
    shape = (*batch, *initial.shape[-2:])
    arrays["initial"] = jnp.broadcast_to(arrays["initial"], shape)
    if "momentum" in arrays:
        velocity = arrays.get("initial_momentum", jnp.zeros(shape, dtype))
        arrays["initial_momentum"] = jnp.broadcast_to(velocity, shape)
    return Operands(**arrays)


def _check_shapes(name, rows, gates, states) -> None:
    for n, array in rows.items():
        check_axes(name, n, array, "[..., T, features]", 2)
    for n, array in states.items():
        check_axes(name, n, array, "[..., m, n]", 2)
    for n, array in gates.items():
        check_axes(name, n, array, "[..., T], one number for each token", 1)
    length, n = rows["x"].shape[-2:]
    m = rows["error"].shape[-1]
    for key, array in states.items():
        if array is not None and array.shape[-2:] != (m, n):
            raise ValueError(f"{name}: {key} has shape {array.shape}, expected [..., {m}, {n}]")
    queries = rows["queries"]
    if queries is not None and queries.shape[-1] != n:
        raise ValueError(f"{name}: queries have {queries.shape[-1]} features where x has {n}")
    counts = {key: array.shape[-2] for key, array in rows.items() if array is not None}
    counts |= {key: array.shape[-1] for key, array in gates.items() if array is not None}
    for key, count in counts.items():
        if count != length:
            raise ValueError(f"{name}: {key} has {count} tokens where x has {length}")
    if states["initial_momentum"] is not None and gates["momentum"] is None:
        raise ValueError(f"{name}: initial_momentum is given without momentum: pass momentum too")
