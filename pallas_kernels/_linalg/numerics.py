"""The precision that memories are accumulated in, and that of the products in a chunk."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Form(NamedTuple):
    """How a chunk's mathematics is written down: the same numbers, for XLA or for a TPU kernel.

    Attributes:
      dense: work on whole matrices under masks, without slices and without transposed rows, which
        cost a kernel more than the products that they save.
      rounded: round the operands of products to bfloat16; sums stay in float32. This is what the
        default precision of float32 products does on TPUs up to v5; later ones take more passes.
    """

    dense: bool = False
    rounded: bool = False

    def operand(self, array):
        """The array in the dtype in which products take it."""
        return array.astype(jnp.bfloat16) if self.rounded else array


PLAIN = Form()


def dot(a, b, contract: tuple[int, int], form: Form):
    """A stack of products that contract one axis of each matrix (0: its rows, 1: its columns).

    Args:
      a: [..., m, n], leading axes as those of b.
      b: [..., k, l].
      contract: the axis of a and that of b.
      form: whether the operands are rounded.
    """
    if a.ndim > 3 and a.shape[0] == 1:  # TPU kernels multiply with one batch axis, no more
        return dot(a[0], b[0], contract, form)[None]
    batch = tuple(range(a.ndim - 2))
    left, right = (a.ndim - 2 + axis for axis in contract)
    dimensions = (((left,), (right,)), (batch, batch))
    if not form.rounded:
        return jax.lax.dot_general(a, b, dimensions)
    return jax.lax.dot_general(
        form.operand(a), form.operand(b), dimensions, preferred_element_type=jnp.float32
    )


def accumulation_dtype(*arrays):
    """float64 if any of the arrays has it, else float32: states, decays and solves take no less.

    `jnp.promote_types` would do, but raises under `numpy_dtype_promotion=strict`.
    """
    wide = any(jnp.dtype(getattr(a, "dtype", a)) == jnp.float64 for a in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)
