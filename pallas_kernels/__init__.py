"""The operations of memories, optimizers and attention: jax only, one folder an operation.

An operation's folder has its public face (`api`), the recurrence as printed (`reference`), the form
that XLA compiles (`xla`) and, where there are kernels, `pallas_tpu` and `pallas_gpu`. What they
share is in `_linalg` (products, inverses, factorisations and scans in plain JAX), `_tpu` and
`_gpu`. The few pieces of it that other packages need as well are exported here.
"""

from pallas_kernels._checks import check_floats, check_width
from pallas_kernels._linalg.lapack import eigh, solve, stacked
from pallas_kernels._linalg.norms import norm, unit
from pallas_kernels._linalg.numerics import accumulation_dtype

__all__ = [
    "accumulation_dtype",
    "check_floats",
    "check_width",
    "eigh",
    "norm",
    "solve",
    "stacked",
    "unit",
]
