"""The iteration on a TPU: a matrix stays in VMEM from the first step to the last.

Plain XLA writes `X`, `X X^T` and its square to memory in every step; here a matrix is read once and
written once. The backward kernel runs the steps again, keeps their `X` in VMEM and goes back.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels._tpu.vmem import MIB, vmem_limit_of
from pallas_kernels.newton_schulz.xla import newton_schulz_xla


def newton_schulz_pallas_tpu(
    x: Float[Array, "*s m n"],
    coefficients: tuple[float, ...],
    steps: int,
    *,
    vmem_limit: int | None = None,
    interpret: bool = False,
) -> Float[Array, "*s m n"]:
    """As the reference; one kernel call for the whole stack, one matrix a grid step.

    Args:
      x: matrices with singular values in [0, 1].
      coefficients: (a, b) or (a, b, c).
      steps: iterations.
      vmem_limit: bytes of VMEM the kernel may use; None: of this process's first device.
      interpret: run on the CPU, for tests.

    Raises:
      NotImplementedError: a matrix that does not fit in VMEM, or numbers of 64 bits.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"the TPU kernel takes float32 and bfloat16, not {x.dtype}")
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    vmem_limit = vmem_limit_of() if vmem_limit is None else vmem_limit
    needed = vmem_bytes(x.shape[-2], x.shape[-1], x.dtype.itemsize)
    if needed > vmem_limit:
        raise NotImplementedError(
            f"a matrix of {x.shape[-2]} x {x.shape[-1]} needs {needed / MIB:.1f} MiB of VMEM, more "
            f"than the limit of {vmem_limit / MIB:.1f} MiB; use implementation='xla'"
        )
    stack = x.reshape(-1, *x.shape[-2:])
    if stack.shape[0]:
        stack = _iterate(stack, coefficients, steps, vmem_limit, interpret)
    x = stack.reshape(x.shape)
    return x if wide else x.mT


def vmem_bytes(rows: int, columns: int, itemsize: int) -> int:
    """VMEM of the forward kernel: input and output twice, X and its product, three squares."""
    rows, columns = -(-rows // 16) * 16, -(-columns // 128) * 128
    square = rows * max(rows, 128)
    return rows * columns * (4 * itemsize + 8) + 12 * square


def _dot(a, b, contract):
    """A product of two matrices with float32 sums, and float32 factors where those are given."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _square(x):
    return _dot(x, x, ((1,), (1,))).astype(x.dtype)


def _polynomial(a, coefficients):
    """`b A + c A^2` in float32, of a symmetric A."""
    total = coefficients[1] * a.astype(jnp.float32)
    if len(coefficients) == 3:
        total = total + coefficients[2] * _dot(a, a, ((1,), (0,)))
    return total


def _step(x, coefficients):
    polynomial = _polynomial(_square(x), coefficients).astype(x.dtype)
    product = _dot(polynomial, x, ((1,), (0,)))
    return (coefficients[0] * x.astype(jnp.float32) + product).astype(x.dtype)


def _step_back(x, g, coefficients):
    """The cotangent of x, from the one of `_step(x)`."""
    a = _square(x)
    back = coefficients[0] * g.astype(jnp.float32)
    back = back + _dot(_polynomial(a, coefficients).astype(x.dtype), g, ((1,), (0,)))
    p = _dot(g, x, ((1,), (1,)))
    of_a = coefficients[1] * p
    if len(coefficients) == 3:
        p = p.astype(x.dtype)
        of_a = of_a + coefficients[2] * (_dot(p, a, ((1,), (0,))) + _dot(a, p, ((1,), (0,))))
    return (back + _dot((of_a + of_a.T).astype(x.dtype), x, ((1,), (0,)))).astype(x.dtype)


def _forward_kernel(x_ref, y_ref, *, coefficients, steps):
    step = lambda _, x: _step(x, coefficients)  # noqa: E731
    y_ref[0] = jax.lax.fori_loop(0, steps, step, x_ref[0])


def _backward_kernel(x_ref, g_ref, dx_ref, kept_ref, *, coefficients, steps):
    def forward(i, x):
        kept_ref[i] = x
        return _step(x, coefficients)

    def backward(i, g):
        return _step_back(kept_ref[steps - 1 - i], g, coefficients)

    jax.lax.fori_loop(0, steps, forward, x_ref[0])
    dx_ref[0] = jax.lax.fori_loop(0, steps, backward, g_ref[0])


def _call(kernel, *operands, vmem_limit, interpret, scratch=(), name):
    stack, rows, columns = operands[0].shape
    block = pl.BlockSpec((1, rows, columns), lambda i: (i, 0, 0))
    return pl.pallas_call(
        kernel,
        grid=(stack,),
        in_specs=[block] * len(operands),
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit
        ),
        interpret=interpret,
        name=name,
    )(*operands)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _iterate(x, coefficients, steps, vmem_limit, interpret):
    return _call(
        partial(_forward_kernel, coefficients=coefficients, steps=steps),
        x,
        vmem_limit=vmem_limit,
        interpret=interpret,
        name="newton_schulz_forward",
    )


def _iterate_bwd(coefficients, steps, vmem_limit, interpret, x, g):
    rows, columns = x.shape[-2:]
    size = vmem_bytes(rows, columns, x.dtype.itemsize)
    needed = 2 * size + steps * rows * columns * x.dtype.itemsize
    if needed > vmem_limit:
        warnings.warn(
            f"the backward pass of newton_schulz on {rows} x {columns} needs "
            f"{needed / MIB:.1f} MiB of VMEM, more than the kernel may use: it runs in XLA",
            stacklevel=2,
        )
        form = partial(newton_schulz_xla, coefficients=coefficients, steps=steps)
        return jax.vjp(form, x)[1](g)
    back = _call(
        partial(_backward_kernel, coefficients=coefficients, steps=steps),
        x,
        g,
        vmem_limit=vmem_limit,
        interpret=interpret,
        scratch=[pltpu.VMEM((max(steps, 1), rows, columns), x.dtype)],
        name="newton_schulz_backward",
    )
    return (back,)


_iterate.defvjp(lambda x, *static: (_iterate(x, *static), x), _iterate_bwd)
