"""Tiles of 64 rows in one warpgroup of a Hopper GPU: operands, products, masks, the inverse.

A matrix is a value in registers (float32, in the layout of `wgmma`) or a reference to shared
memory. Products take bfloat16. A float32 matrix that must keep its precision is the sum of two
bfloat16 "parts", and a product of two such matrices is three products of parts: good to about
2^-16.

Mosaic GPU's interpreter cannot multiply operands that are in registers or transposed, has no
layouts, and cannot broadcast a vector along a tile: with `interpret` these go through jnp.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a tile: what one warpgroup multiplies at once
SMEM_LIMIT = 227 * 1024  # bytes of shared memory that a block may have on Hopper (sm90)
_COMPILER = 1024  # bytes of it for barriers
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def _load(ref: Any, **options: Any) -> jax.Array:
    """All of a reference; up to jax 0.10 an index comes with it."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, **options)


class Flipped(NamedTuple):
    """A reference that is read transposed."""

    ref: Any


def tile(*shape: int, parts: int) -> Any:
    """Shared memory for matrices of `parts` parts: [..., parts, rows, columns] of bfloat16."""
    shape = (*shape[:-2], parts, *shape[-2:])
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=_TRANSFORMS)


def split(value: Any, parts: int) -> tuple[Any, ...]:
    """A float32 array as parts: one part rounds it, two add up to it within 2^-17 of it."""
    high = value.astype(jnp.bfloat16)
    if parts == 1:
        return (high,)
    return high, (value - high.astype(jnp.float32)).astype(jnp.bfloat16)


def as_tiles(array: Any, dtype: Any) -> Any:
    """[S, features, T] -> [S, N, 64, features] in the dtype that it came in."""
    array = jnp.swapaxes(array, -1, -2).astype(dtype)
    return array.reshape(array.shape[0], -1, ROWS, array.shape[-1])


def as_parts(array: Any, parts: int) -> Any:
    """An array as the sum of `parts` bfloat16 ones, [P, ...]."""
    return jnp.stack(split(array, parts))


def summed(parts: Any, dtype: Any) -> Any:
    """The inverse of `as_parts`."""
    return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(dtype)


def scratch_bytes(scratch: dict[str, Any]) -> int:
    """Bytes of shared memory of a block: its scratch, aligned, and the compiler's own."""
    sizes = (math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in scratch.values())
    return sum(-(-size // 1024) * 1024 for size in sizes) + _COMPILER


def launch(body: Callable, grid: tuple[int, int], outputs: Any, scratch: Any, *, name, interpret):
    """A kernel of one warpgroup for each (sequence, block); see `where`."""
    return plgpu.kernel(
        body,
        out_type=outputs,
        grid=grid,
        grid_names=("sequence", "block"),
        scratch_types=scratch,
        # sums along rows stay in a warp: they need no shared memory
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name=name,
    )


def where() -> Any:
    """The sequence and the block of it that this block of threads works on."""
    return lax.axis_index("sequence"), lax.axis_index("block")


class Warpgroup(NamedTuple):
    """What 128 threads do with tiles.

    Attributes:
      parts: of a matrix in shared memory, 1 or 2.
      interpret: whether the kernel is interpreted on a CPU.
    """

    parts: int
    interpret: bool

    def get(self, ref: Any) -> Any:
        """The float32 value of a matrix in shared memory, [parts, rows, columns]."""
        return sum((ref[i].astype(jnp.float32) for i in range(1, self.parts)), _first(ref))

    def put(self, ref: Any, value: Any) -> None:
        """Store a float32 value as parts, for the products that follow."""
        for i, part in enumerate(split(value, self.parts)):
            ref[i] = part
        plgpu.commit_smem()

    def split(self, value: Any) -> tuple[Any, ...]:
        """A value as a product's left operand in registers."""
        return split(value, self.parts)

    def product(self, *terms: Any) -> Any:
        """The sum of the products of pairs (left, right), in float32.

        A left operand is a reference, a `Flipped` one or parts in registers; a right one is a
        reference or `Flipped`. The product of both second parts is left out: it is below the
        precision of the sum.
        """
        pairs = [
            (_part(left, i), _part(right, j))
            for left, right in terms
            for i in range(_parts(left))
            for j in range(self.parts)
            if i + j < self.parts
        ]
        if self.interpret:
            return sum(_dot(_value(left), _value(right)) for left, right in pairs)
        columns = _part_shape(terms[0][1])[1]

        def multiply(total):
            for left, right in pairs:
                plgpu.wgmma(total, _flip(left), _flip(right))
            return total[...]

        return pl.run_scoped(multiply, plgpu.ACC((ROWS, columns), jnp.float32))

    def vector(self, given: Any) -> Any:
        """A vector [64], a value or in shared memory, in the layout of a sum along rows."""
        return self._vector(given, 0)

    def along_rows(self, given: Any, columns: int) -> Any:
        """A vector [64], a value or in shared memory, as [64, columns]: one number for each row."""
        return self._spread(given, columns, 0)

    def along_columns(self, ref: Any) -> Any:
        """A vector [64] in shared memory as a matrix [64, 64]: one number for each column."""
        return self._spread(ref, ROWS, 1)

    def sums(self, value: Any, held: Any, keep: Callable) -> Any:
        """For each i the sum of a vector [64] over the j with `keep(i, j)`, by way of `held`."""
        held[...] = value
        return jnp.sum(self.masked(self.along_columns(held), keep), axis=1)

    def _vector(self, given, axis):
        if self.interpret or isinstance(given, jax.Array):
            return given[...]
        return _load(given, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)

    def _spread(self, given, columns, axis):
        value = lax.broadcast_in_dim(self._vector(given, axis), (ROWS, columns), (axis,))
        return value if self.interpret else plgpu.layout_cast(value, plgpu.Layout.WGMMA)

    def load(self, ref: Any) -> Any:
        """A float32 matrix of global memory."""
        if self.interpret:
            return ref[...]
        return _load(ref, layout=plgpu.Layout.WGMMA, optimized=False)

    def full(self, number: float, columns: int) -> Any:
        """A matrix [64, columns] of one number."""
        value = jnp.full((ROWS, columns), number, jnp.float32)
        return value if self.interpret else plgpu.layout_cast(value, plgpu.Layout.WGMMA)

    def masked(self, matrix: Any, keep: Callable, *, other: float = 0.0) -> Any:
        """`matrix` [64, 64] where `keep(row, column)`, else `other`."""
        layout = None if self.interpret else plgpu.Layout.WGMMA
        row, column = (
            plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis, layout=layout) for axis in (0, 1)
        )
        return jnp.where(keep(row, column), matrix, self.full(other, ROWS))

    def inverse(self, lower: Any, held: Any, work: Any) -> Any:
        """(I + lower)^-1 of a strictly lower triangular value, as `triangular` does it.

        Blocks of four in closed form, then pairs merged. A merge multiplies by the whole lower
        matrix, as it lies in shared memory, and masks the product: what belongs to other pairs is
        dropped there. `held` and `work` are tiles.
        """
        self.put(held, lower)
        fours = self.masked(lower, lambda i, j: (i >> 2) == (j >> 2))
        self.put(work, fours)
        square = self.product((self.split(fours), work))
        cube = self.product((self.split(square), work))
        found = self.masked(self.full(1.0, ROWS), lambda i, j: i == j) - fours + square - cube
        for bits in range(2, ROWS.bit_length() - 1):
            right = self.product((self.split(found), held))
            right = self.masked(right, partial(_between, bits=bits))
            self.put(work, found)
            found = found - self.product((self.split(right), work))
        return found


def _between(i, j, bits):
    """Below the diagonal blocks of 2^bits, inside those of twice the size."""
    return ((i >> bits) == (j >> bits) + 1) & ((i >> (bits + 1)) == (j >> (bits + 1)))


def _first(ref):
    return ref[0].astype(jnp.float32)


def _parts(left):
    if isinstance(left, Flipped):
        left = left.ref
    return left.shape[0] if hasattr(left, "shape") else len(left)


def _part(operand, i):
    if isinstance(operand, Flipped):
        return Flipped(operand.ref.at[i])
    return operand[i] if isinstance(operand, tuple) else operand.at[i]


def _part_shape(operand):
    if isinstance(operand, Flipped):
        return operand.ref.shape[-2:][::-1]
    return operand.shape[-2:]


def _flip(operand):
    if isinstance(operand, Flipped):
        return operand.ref.transpose((1, 0))
    return operand


def _value(operand):
    if isinstance(operand, Flipped):
        return operand.ref[...].T
    return operand if isinstance(operand, jax.Array) else operand[...]


def _dot(left, right):
    return lax.dot_general(
        left, right, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
