"""The inverse of unit-lower-triangular matrices by products alone: no serial substitution."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 16  # inverted under masks; larger matrices are merged from such blocks


def masked(matrix, keep, *, other: float = 0.0):
    """`matrix` where `keep(row, column)`, else `other`; `keep` takes arrays of indices.

    The indices have the rank of the matrix from the start: a mask that is reshaped or broadcast
    over more than axes of size one does not compile in a TPU kernel.
    """
    shape = (1,) * (matrix.ndim - 2) + matrix.shape[-2:]
    row, column = (
        jax.lax.broadcasted_iota(jnp.int32, shape, matrix.ndim - axis) for axis in (2, 1)
    )
    return jnp.where(keep(row, column), matrix, other)


def _identity_minus(matrix):
    return masked(jnp.ones_like(matrix), lambda i, j: i == j) - matrix


def _invert_small(lower):
    """(I + L)^-1 of one block: fours in closed form, then pairs merged under masks."""
    fours = masked(lower, lambda i, j: (i > j) & (i >> 2 == j >> 2))
    # I - N + N^2 - N^3, since N^4 = 0
    inverse = _identity_minus(fours) @ _identity_minus(-fours @ fours)
    bits = 2
    while 1 << bits < lower.shape[-1]:
        between = partial(_between, bits=bits)
        inverse = inverse - inverse @ masked(lower, between) @ inverse
        bits += 1
    return inverse


def _between(i, j, bits):
    """Below the diagonal blocks of 2^bits, inside those of twice the size."""
    return (i >> bits == (j >> bits) + 1) & (i >> (bits + 1) == j >> (bits + 1))


def _diagonal_blocks(matrix, size):
    """[..., n, n] -> [..., n / size, size, size]."""
    starts = range(0, matrix.shape[-1], size)
    return jnp.stack([matrix[..., i : i + size, i : i + size] for i in starts], axis=-3)


def invert_unit_lower(
    lower: Float[Array, "*b n n"], *, dense: bool = False
) -> Float[Array, "*b n n"]:
    """(I + L)^-1, L the strict lower triangle of `lower`, by products alone.

    Fours in closed form, then merged: doubling over a whole chunk overflows for correlated keys.
    `dense` merges whole matrices under masks, without a slice: more products, as a kernel likes it.
    """
    n = lower.shape[-1]
    if n <= BLOCK or dense:
        return _invert_small(lower)
    padded = BLOCK
    while padded < n:
        padded *= 2
    lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, padded - n)] * 2)
    inverse, size = _invert_small(_diagonal_blocks(lower, BLOCK)), BLOCK
    while size < padded:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = _diagonal_blocks(lower, 2 * size)[..., size:, :size]
        corner = -(second @ corner @ first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        bottom = jnp.concatenate([corner, second], axis=-1)
        inverse, size = jnp.concatenate([top, bottom], axis=-2), 2 * size
    return inverse[..., 0, :n, :n]
