"""The iteration as it is printed, one matrix product after another: the oracle of the fast form."""

from jaxtyping import Array, Float


def newton_schulz_reference(
    x: Float[Array, "*s m n"], coefficients: tuple[float, ...], steps: int
) -> Float[Array, "*s m n"]:
    """`X <- a X + b (X X^T) X + c (X X^T)^2 X`, `steps` times, never transposed.

    Args:
      x: matrices with singular values in [0, 1], in the accumulation dtype.
      coefficients: (a, b) or (a, b, c).
      steps: iterations.
    """
    for _ in range(steps):
        power, total = x, coefficients[0] * x
        for coefficient in coefficients[1:]:
            power = (power @ x.mT) @ x
            total = total + coefficient * power
        x = total
    return x
