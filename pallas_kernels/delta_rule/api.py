"""The public face of the delta rule: validates, picks an implementation, casts back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._linalg.numerics import accumulation_dtype
from pallas_kernels.delta_rule.pallas_tpu import delta_rule_pallas_tpu
from pallas_kernels.delta_rule.reference import delta_rule_reference
from pallas_kernels.delta_rule.types import DeltaOutput, Operands
from pallas_kernels.delta_rule.xla import delta_chunk_xla, delta_rule_xla

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
    retention has neither erase nor momentum. Leading dimensions of size one broadcast.

    Args:
      x: keys, or the inputs of the weight matrix, [..., T, n].
      error: gradient with respect to the matrix's output, [..., T, m].
      learning_rate: inner learning rates, [..., T].
      initial: the memory before the first token, [..., m, n].
      decay: fraction of the memory kept, in (0, 1], [..., T].
      erase: strength of the erasure along `x_t`, [..., T].
      momentum: momentum coefficients in [0, 1], [..., T]; the chunked forms work with logarithms
        and give the coefficient no gradient at exactly 0.
      initial_momentum: [..., m, n]; zeros when None.
      queries: [..., T, n]; None reads nothing.
      read: "running_prev" reads `W_{t-1} q_t`, "running" `W_t q_t`, "anchor" `W_0 q_t`.
      chunk_size: tokens solved in parallel; changes the speed, not the result.
      implementation: "reference" (token by token), "xla" (chunk-parallel), "pallas_tpu" or
        "pallas_gpu" (the same in one kernel each way; on a mesh only inside `jax.shard_map`) or
        None, which is "xla": the kernels have been compiled for TPUs and for Hopper GPUs and
        checked in interpret mode; neither has run on one.

    Returns:
      `DeltaOutput(reads, final, final_momentum)`; reads in the dtype of `x`, states in at least
      float32.

    Raises:
      ValueError: a shape, read or implementation that does not fit, with its value.
      NotImplementedError: "pallas_tpu" in float64; "pallas_gpu" with momentum, in float64, with
        other chunks than of 64 tokens, and with a memory that is not 64 k x 64 or 64 k x 128.

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
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    gates = (learning_rate, decay, erase, momentum)
    x, error, queries = _tokens_last(x, error, queries)
    operands = _prepare(x, error, gates, initial, initial_momentum, queries)
    if implementation == "reference":
        out = delta_rule_reference(operands, read=read)
    elif implementation == "xla":
        out = delta_rule_xla(operands, read=read, chunk_size=chunk_size)
    elif implementation == "pallas_tpu":
        out = delta_rule_pallas_tpu(operands, read=read, chunk_size=chunk_size)
    else:
        # Mosaic GPU is imported where it is asked for: it needs absl, which jax does not require
        from pallas_kernels.delta_rule.pallas_gpu import delta_rule_pallas_gpu

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
    gates, dtype = (learning_rate, decay, erase, momentum), x.dtype
    x, error, queries = _tokens_last(x, error, queries)
    operands = _prepare(x, error, gates, initial, initial_momentum, queries)
    form = delta_rule_reference if implementation == "reference" else delta_chunk_xla
    return _tokens_first(form(operands, read=read), dtype)


def _tokens_last(*arrays):
    return tuple(None if a is None else jnp.swapaxes(a, -1, -2) for a in arrays)


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


def _prepare(x, error, gates, initial, initial_momentum, queries) -> Operands:
    """Check the shapes, cast to the accumulation dtype, give the states the batch's shape."""
    n, m, length = x.shape[-2], error.shape[-2], x.shape[-1]
    if initial.shape[-2:] != (m, n):
        raise ValueError(f"initial has shape {initial.shape}, expected [..., {m}, {n}]")
    tokens = {"error": error.shape[-1]}
    for name, gate in zip(("learning_rate", "decay", "erase", "momentum"), gates, strict=True):
        if gate is not None:
            tokens[name] = gate.shape[-1]
    for name, count in tokens.items():
        if count != length:
            raise ValueError(f"{name} has {count} tokens where x has {length}")
    if initial_momentum is not None and gates[3] is None:
        raise ValueError("initial_momentum is given without momentum: pass momentum too")
    dtype = accumulation_dtype(initial, x)
    given = [gate.shape[:-1] for gate in gates if gate is not None]
    batch = jnp.broadcast_shapes(*given, *(a.shape[:-2] for a in (x, error, initial)))
    initial = jnp.broadcast_to(initial, (*batch, m, n))
    if gates[3] is not None:
        if initial_momentum is None:
            initial_momentum = jnp.zeros_like(initial)
        initial_momentum = jnp.broadcast_to(initial_momentum, (*batch, m, n))
    learning_rate, decay, erase, momentum = gates
    operands = Operands(
        x, error, learning_rate, initial, decay, erase, momentum, initial_momentum, queries
    )
    return jax.tree.map(lambda array: array.astype(dtype), operands)
