"""Factorizations of stacks of matrices that cannot deadlock on a CPU.

XLA's batched routines on a CPU (LU, QR, Cholesky, triangular solves, eigendecompositions) spread a
large stack over the thread pool that their caller runs on, and wait for it. Two such calls at once
on two cores wait for each other and never end (jaxlib 0.10.2). A call with a single matrix is not
spread, so that a CPU is given one matrix at a time here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def stacked(routine: Callable[..., Any], *operands: Array) -> Any:
    """Apply `routine` to every matrix of stacks that have the same leading dimensions.

    Args:
      routine: takes matrices, gives a tree of arrays; on a CPU it is called with single matrices.
      operands: its arguments, [..., m, n].
    """
    batch = operands[0].ndim - 2

    def together(*operands):
        batched = routine
        for _ in range(batch):
            batched = jax.vmap(batched)
        return batched(*operands)

    one_by_one = _one_by_one(routine, batch)
    return jax.lax.platform_dependent(*operands, cpu=one_by_one, default=together)


def _one_by_one(routine: Callable[..., Any], batch: int) -> Callable[..., Any]:
    """`routine` in loops over `batch` leading axes, the first axis outermost.

    A `jax.vmap` adds one more loop on the outside. With `jax.custom_batching.sequential_vmap` the
    loops would nest the other way round, so that the results had to be transposed back. XLA (jaxlib
    0.10.2) infers a wrong shape for a product of two such results with three leading axes, and the
    compiler aborts.
    """

    @jax.custom_batching.custom_vmap
    def loops(*operands):
        mapped = routine
        for _ in range(batch):
            mapped = _loop(mapped)
        return mapped(*operands)

    @loops.def_vmap
    def _(size, are_batched, *operands):
        given = [
            array if batched else jnp.broadcast_to(array, (size, *array.shape))
            for array, batched in zip(operands, are_batched, strict=True)
        ]
        results = _one_by_one(routine, batch + 1)(*given)
        return results, jax.tree.map(lambda _: True, results)

    return loops


def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands: jax.lax.map(lambda slices: function(*slices), operands)


def eigh(a: Float[Array, "*b n n"]) -> tuple[Float[Array, "*b n"], Float[Array, "*b n n"]]:
    """`jnp.linalg.eigh` of stacks: eigenvalues in ascending order, eigenvectors as columns."""
    return stacked(lambda matrix: tuple(jnp.linalg.eigh(matrix)), a)


def solve(a: Float[Array, "*b n n"], right: Float[Array, "*b n m"]) -> Float[Array, "*b n m"]:
    """X with a X = right: `jnp.linalg.solve` of stacks, differentiable in any mode and order."""
    fixed = jax.lax.stop_gradient(a)
    return jax.lax.custom_linear_solve(
        lambda x: a @ x,
        right,
        lambda _, b: stacked(jnp.linalg.solve, fixed, b),
        lambda _, b: stacked(jnp.linalg.solve, jnp.swapaxes(fixed, -1, -2), b),
    )
