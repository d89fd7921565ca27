"""The iteration on the smaller side of the matrices, in one loop that compiles once."""

import jax
from jaxtyping import Array, Float


def newton_schulz_xla(
    x: Float[Array, "*s m n"], coefficients: tuple[float, ...], steps: int
) -> Float[Array, "*s m n"]:
    """`X <- (a I + b A + c A^2) X` with `A = X X^T`, rows the smaller side (spec B7).

    Costs `steps (4 m^2 n + 2 m^3)` operations a matrix for (a, b, c) with m <= n.
    """
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT

    def step(_, x):
        a = x @ x.mT
        total = coefficients[1] * a
        if len(coefficients) == 3:
            total = total + coefficients[2] * (a @ a)
        return coefficients[0] * x + total @ x

    x = jax.lax.fori_loop(0, steps, step, x)
    return x if wide else x.mT
