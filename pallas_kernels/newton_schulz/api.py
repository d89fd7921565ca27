"""The public face of Newton-Schulz: validates, normalises, picks an implementation, casts back."""

from jaxtyping import Array, DTypeLike, Float

from pallas_kernels._linalg.norms import unit
from pallas_kernels._linalg.numerics import accumulation_dtype
from pallas_kernels.newton_schulz.pallas_tpu import newton_schulz_pallas_tpu
from pallas_kernels.newton_schulz.reference import newton_schulz_reference
from pallas_kernels.newton_schulz.xla import newton_schulz_xla

# X <- a X + b (X X^T) X [+ c (X X^T)^2 X]
COEFFICIENTS = {"quintic": (3.4445, -4.7750, 2.0315), "cubic": (1.5, -0.5)}
_IMPLEMENTATIONS = {
    "reference": newton_schulz_reference,
    "xla": newton_schulz_xla,
    "pallas_tpu": newton_schulz_pallas_tpu,
}


def newton_schulz(
    x: Float[Array, "..."],
    *,
    variant: str = "quintic",
    steps: int = 5,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """Approximate the orthogonal factor U V^T of each matrix U S V^T.

    `X <- x / |x|_F`, then `steps` times `X <- a X + b A X + c A^2 X`, `A = X X^T`. The result does
    not depend on the scale of x, and is 0, with derivative 0, at x = 0. "cubic" converges to
    singular values of 1 (one step descends `1/4 |X^T X - I|^2` with step 1/2); "quintic" gets close
    in five steps, to values in about [0.68, 1.14], and never converges.

    Args:
      x: matrices [..., m, n], any stack of them in front.
      variant: "quintic" (Muon's coefficients) or "cubic".
      steps: iterations; generic matrices need 5 with "quintic" and 10-15 with "cubic".
      dtype: what the products are computed in; None: at least float32. bfloat16 is faster on
        accelerators, and off by up to 0.1.
      implementation: "reference" (as printed), "xla" (on the smaller side), "pallas_tpu" (each
        matrix stays in VMEM; on a mesh only inside `jax.shard_map`) or None, which is "xla": the
        kernel has been compiled for TPUs and checked in interpret mode, not timed on one.

    Returns:
      Matrices [..., m, n] in the dtype of x.

    Raises:
      ValueError: x without two axes, an unknown variant or implementation, fewer than 0 steps.
      NotImplementedError: "pallas_tpu" with matrices that do not fit in VMEM, or in float64;
        "pallas_gpu", which is not written.

    Example:
      >>> import jax.numpy as jnp
      >>> x = newton_schulz(jnp.diag(jnp.array([3.0, 4.0])), variant="cubic", steps=20)
      >>> x.round(3).tolist()
      [[1.0, 0.0], [0.0, 1.0]]

    References:
      Nested Learning (arXiv 2512.24695) eq. 43-44, 52; Jordan et al., Muon (2024).

    Departure from the paper: eq. 44 adds a term `O - g` that is not in its objective, eq. 43; it is
    left out.
    """
    if x.ndim < 2:
        raise ValueError(f"newton_schulz needs matrices [..., m, n], got shape {x.shape}")
    if variant not in COEFFICIENTS:
        raise ValueError(f"variant={variant!r} is not one of {', '.join(COEFFICIENTS)}")
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps={steps!r} must be an integer >= 0, known when compiling")
    implementation = "xla" if implementation is None else implementation
    if implementation == "pallas_gpu":
        raise NotImplementedError(
            "newton_schulz has no implementation='pallas_gpu': use 'xla' (cuBLAS products)"
        )
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r} is not one of {known}")
    wide = x.astype(accumulation_dtype(x))
    start = unit(wide, (-2, -1)).astype(wide.dtype if dtype is None else dtype)
    result = _IMPLEMENTATIONS[implementation](start, COEFFICIENTS[variant], steps)
    return result.astype(x.dtype)
