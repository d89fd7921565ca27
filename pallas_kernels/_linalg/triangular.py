"""The inverse of unit-lower-triangular matrices by products alone, without serial substitution.

Two neighbouring blocks A and B of the diagonal, with C below A, are merged by

    [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]],

so that every level of the recursion doubles the size of the inverted blocks with two products.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._linalg.derivatives import differentiable
from pallas_kernels._linalg.numerics import PLAIN, Form, dot

BLOCK = 16  # inverted as a whole, under masks; larger matrices are merged from such blocks
_SUBLANES = 8  # rows of a register: a kernel splits a matrix at multiples of them without moving it


def masked(matrix, keep, *, other: float = 0.0):
    """`matrix` where `keep(row, column)`, else `other`; `keep` takes arrays of indices.

    The indices have the rank of the matrix from the start, since a TPU kernel does not compile a
    mask that is reshaped, or broadcast over more than axes of size one. The gradient makes its own
    mask: keeping this one for it would cost a matrix of memory.
    """
    return _masked(matrix, keep, other)


def _where(matrix, keep, other):
    shape = (1,) * (matrix.ndim - 2) + matrix.shape[-2:]
    row, column = (
        jax.lax.broadcasted_iota(jnp.int32, shape, matrix.ndim - axis) for axis in (2, 1)
    )
    return jnp.where(keep(row, column), matrix, other)


_masked: Callable[..., Any] = differentiable(
    _where,
    lambda *given: (_where(*given), None),
    lambda keep, other, _, tangents: _masked(tangents[0], keep, 0.0),
    lambda keep, other, _, g: (_masked(g, keep, 0.0),),
    static=2,
)


def _identity_minus(matrix):
    return masked(jnp.ones_like(matrix), lambda i, j: i == j) - matrix


def _matmul(a, b, form: Form):
    return dot(a, b, (1, 0), form)


def _invert_small(lower, form: Form):
    """(I + L)^-1 of one block: blocks of four in closed form, then pairs merged under masks.

    With X the block-diagonal inverse so far and C what lies below its pairs, X - X C X has both
    diagonal blocks of the merged inverse and its corner -B^-1 C A^-1: the mask of C takes the place
    of slicing, which would move data for less work than a product of 16 x 16.
    """
    matmul = partial(_matmul, form=form)
    fours = masked(lower, lambda i, j: (i > j) & (i >> 2 == j >> 2))
    # (I + N)^-1 = I - N + N^2 - N^3 = (I - N)(I + N^2), since N^4 = 0 for a block of four
    inverse = matmul(_identity_minus(fours), _identity_minus(-matmul(fours, fours)))
    bits, n = 2, lower.shape[-1]
    while 1 << bits < n:
        corner = masked(lower, partial(_between, bits=bits))
        size = 1 << bits
        if form.dense and size >= _SUBLANES and n % (2 * size) == 0:
            # X C X changes the rows of the lower block of each pair only: half of both products
            rows = _every_other(inverse, size)
            moved = rows[1] - matmul(matmul(rows[1], corner), inverse)
            inverse = _in_turn(rows[0], moved, size)
        else:
            inverse = inverse - matmul(matmul(inverse, corner), inverse)
        bits += 1
    return inverse


def _every_other(matrix, size: int):
    """The rows of the even blocks of `size` rows, and those of the odd ones."""
    blocks = [matrix[..., i : i + size, :] for i in range(0, matrix.shape[-2], size)]
    return jnp.concatenate(blocks[0::2], axis=-2), jnp.concatenate(blocks[1::2], axis=-2)


def _in_turn(even, odd, size: int):
    """The inverse of `_every_other`."""
    starts = range(0, even.shape[-2], size)
    blocks = [rows[..., i : i + size, :] for i in starts for rows in (even, odd)]
    return jnp.concatenate(blocks, axis=-2)


def _between(i, j, bits):
    """Below the diagonal blocks of 2^bits, inside those of twice the size."""
    return (i >> bits == (j >> bits) + 1) & (i >> (bits + 1) == j >> (bits + 1))


def _diagonal_blocks(matrix, size):
    """[..., n, n] -> [..., n / size, size, size]."""
    # Concatenated, not stacked. Under `jax.vmap` a stack along the first axis puts the mapped axis
    # behind the new one, so two maps rotate three leading axes. XLA (jaxlib 0.10.2) infers a wrong
    # shape for a product whose two operands are both such rotations, and the compiler aborts.
    starts = range(0, matrix.shape[-1], size)
    blocks = [matrix[..., None, i : i + size, i : i + size] for i in starts]
    return jnp.concatenate(blocks, axis=-3)


def invert_unit_lower(lower: Float[Array, "*b n n"], form: Form = PLAIN) -> Float[Array, "*b n n"]:
    """(I + L)^-1, L the strict lower triangle of `lower`, by products alone.

    The product form (I - N)(I + N^2)(I + N^4)... over a whole chunk is shorter, but its powers
    overflow when keys are correlated. Merging inverses of blocks never forms a power beyond N^3.
    With a dense `form` whole matrices are merged under masks, without slices: more arithmetic, but
    nothing that a TPU kernel would have to move.
    """
    n = lower.shape[-1]
    if n <= BLOCK or form.dense:
        return _invert_small(lower, form)
    padded = BLOCK
    while padded < n:
        padded *= 2
    lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, padded - n)] * 2)
    inverse, size = _invert_small(_diagonal_blocks(lower, BLOCK), form), BLOCK
    while size < padded:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = _diagonal_blocks(lower, 2 * size)[..., size:, :size]
        corner = -_matmul(_matmul(second, corner, form), first, form)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        bottom = jnp.concatenate([corner, second], axis=-1)
        inverse, size = jnp.concatenate([top, bottom], axis=-2), 2 * size
    return inverse[..., 0, :n, :n]
