"""Factorizations of stacks of matrices that do not wait for each other for ever.

Some of XLA's batched routines on a CPU (LU, QR, Cholesky, triangular solves) share out a large
stack over the thread pool that their caller runs on, and wait. Two such calls at once on two cores
never end (jaxlib 0.10.2). One matrix a call is not shared out, so a CPU takes one at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def stacked(routine: Callable[..., Array], *operands: Array) -> Array:
    """`routine` of every matrix of stacks of the same leading dimensions.

    Args:
      routine: from matrices to an array; also a batched one is given single matrices on a CPU.
      operands: its arguments, [..., m, n].
    """
    single, batch = jax.custom_batching.sequential_vmap(routine), operands[0].ndim - 2
    for _ in range(batch):
        single = jax.vmap(single)

    def together(*operands):
        batched = routine
        for _ in range(batch):
            batched = jax.vmap(batched)
        return batched(*operands)

    return jax.lax.platform_dependent(*operands, cpu=single, default=together)


def solve(a: Float[Array, "*b n n"], right: Float[Array, "*b n m"]) -> Float[Array, "*b n m"]:
    """X with a X = right: `jnp.linalg.solve` of stacks, differentiable in any mode and order."""
    fixed = jax.lax.stop_gradient(a)
    return jax.lax.custom_linear_solve(
        lambda x: a @ x,
        right,
        lambda _, b: stacked(jnp.linalg.solve, fixed, b),
        lambda _, b: stacked(jnp.linalg.solve, jnp.swapaxes(fixed, -1, -2), b),
    )
