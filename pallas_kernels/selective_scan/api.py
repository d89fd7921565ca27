"""The public face of the selective scan: validates, picks an implementation, casts back."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._checks import check_floats, check_integer
from pallas_kernels._linalg.derivatives import reverse_only
from pallas_kernels._linalg.numerics import accumulation_dtype
from pallas_kernels.selective_scan.pallas_tpu import selective_scan_pallas_tpu
from pallas_kernels.selective_scan.reference import selective_scan_reference
from pallas_kernels.selective_scan.xla import selective_scan_xla

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")


class ScanOutput(NamedTuple):
    """What a scan gives back.

    Attributes:
      outputs: [..., T, D], in the dtype of `x`.
      final: [..., D, N], the state after the last token, in at least float32.
    """

    outputs: Float[Array, "... T D"]
    final: Float[Array, "... D N"]


def selective_scan(
    x: Float[Array, "..."],
    step: Float[Array, "..."],
    decay: Float[Array, "..."],
    write: Float[Array, "..."],
    read: Float[Array, "..."],
    *,
    skip: Float[Array, "..."] | None = None,
    initial: Float[Array, "..."] | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> ScanOutput:
    """Run Mamba's diagonal recurrence over a sequence.

    `h_t = exp(step_t decay) h_{t-1} + step_t x_t write_t^T`, `y_t = h_t read_t + skip x_t`, with a
    state of N numbers for each of D channels. A token whose step is 0 is not written.

    Args:
      x: [..., T, D].
      step: positive step sizes, after their softplus, [..., T, D].
      decay: negative rates A, [D, N].
      write: B, [..., T, N].
      read: C, [..., T, N].
      skip: D of the paper, [D]; None adds nothing.
      initial: the state before the first token, [..., D, N]; zeros when None.
      chunk_size: tokens solved in parallel; changes the speed, not the result.
      implementation: "reference" (token by token), "xla" (chunk by chunk; inside a chunk in
        parallel, on a CPU token by token), "pallas_tpu" (one kernel each way; on a mesh only inside
        `jax.shard_map`) or None, which is "xla": the kernel has been compiled for TPUs and checked
        in interpret mode, not timed on one.

    Raises:
      ValueError: a shape, chunk size or implementation that does not fit, with its value.
      NotImplementedError: "pallas_tpu" in float64, or with a chunk that does not fit in VMEM;
        "pallas_gpu", which is not written.

    Example:
      >>> import jax.numpy as jnp
      >>> one = jnp.ones((3, 1))
      >>> out = selective_scan(one, one, jnp.log(jnp.full((1, 1), 0.5)), one, one)
      >>> out.outputs[:, 0].tolist(), out.final.tolist()
      ([1.0, 1.5, 1.75], [[1.75]])

    References:
      Mamba (arXiv 2312.00752), algorithm 2: the decay is discretised exactly, the input by Euler.
    """
    implementation = "xla" if implementation is None else implementation
    if implementation == "pallas_gpu":
        raise NotImplementedError("selective_scan has no implementation='pallas_gpu': use 'xla'")
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r} is not one of {known}")
    check_integer("selective_scan", "chunk_size", chunk_size, 1)
    _check_shapes(x, step, decay, write, read, skip, initial)
    dtype = accumulation_dtype(*jax.tree.leaves((x, step, decay, write, read, skip, initial)))
    if initial is None:
        initial = jnp.zeros((*x.shape[:-2], *decay.shape), dtype)
    if implementation == "reference":
        form = selective_scan_reference
    elif implementation == "xla":
        form = partial(selective_scan_xla, chunk_size=chunk_size, sequential=_on_cpu())
    else:
        form = partial(selective_scan_pallas_tpu, chunk_size=chunk_size)
    given = (x, step, decay, write, read, initial)
    operands = jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), given)
    if implementation == "pallas_tpu":
        operands = reverse_only(operands, "selective_scan(implementation='pallas_tpu')")
    y, final = form(*operands)
    if skip is not None:
        y = y + skip.astype(dtype).reshape((1,) * (x.ndim - 1) + skip.shape) * operands[0]
    return ScanOutput(y.astype(x.dtype), final)


def _on_cpu() -> bool:
    return jax.devices()[0].platform == "cpu"


def _check_shapes(x, step, decay, write, read, skip, initial) -> None:
    arrays = {"x": x, "step": step, "decay": decay, "write": write, "read": read}
    check_floats("selective_scan", **arrays, skip=skip, initial=initial)
    if x.ndim < 2 or decay.ndim != 2 or decay.shape[0] != x.shape[-1]:
        raise ValueError(f"decay has shape {decay.shape}, expected [D, N] for x {x.shape}")
    per_token = (*x.shape[:-1], decay.shape[1])
    expected = {"step": (step, x.shape), "write": (write, per_token), "read": (read, per_token)}
    if skip is not None:
        expected["skip"] = (skip, x.shape[-1:])
    if initial is not None:
        expected["initial"] = (initial, (*x.shape[:-2], *decay.shape))
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} for x {x.shape}")
