"""Batched matrix products whose gradients are products in the same layout.

JAX's own rule for the second operand of a product gives its transpose and then a copy; the copies
cost as much as the products when the matrices are small. Here each gradient is written down in the
layout of what it belongs to. Reverse mode only, of any order.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.triangular import invert_unit_lower, masked

# Names the inverses in `solve_unit_lower` for checkpoint policies: what is dear to recompute.
INVERSE = "invert_unit_lower"


def _dot(a, b, contract: tuple[int, int]):
    if a.ndim > 3 and a.shape[0] == 1:  # TPU kernels multiply with one batch axis, no more
        return _dot(a[0], b[0], contract)[None]
    batch = tuple(range(a.ndim - 2))
    left, right = (a.ndim - 2 + axis for axis in contract)
    return jax.lax.dot_general(a, b, (((left,), (right,)), (batch, batch)))


@jax.custom_vjp
def _nn(a, b):
    return _dot(a, b, (1, 0))


@jax.custom_vjp
def _nt(a, b):
    return _dot(a, b, (1, 1))


@jax.custom_vjp
def _tn(a, b):
    return _dot(a, b, (0, 0))


def _keep(form):
    return lambda a, b: (form(a, b), (a, b))


_nn.defvjp(_keep(_nn), lambda kept, g: (_nt(g, kept[1]), _tn(kept[0], g)))
_nt.defvjp(_keep(_nt), lambda kept, g: (_nn(g, kept[1]), _tn(g, kept[0])))
_tn.defvjp(_keep(_tn), lambda kept, g: (_nt(kept[1], g), _nn(kept[0], g)))


def _same_batch(a, b):
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return tuple(jnp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, b))


def nn(a: Float[Array, "*a m k"], b: Float[Array, "*b k n"]) -> Float[Array, "*c m n"]:
    """a b; leading dimensions of size one broadcast, also in `nt` and `tn`."""
    return _nn(*_same_batch(a, b))


def nt(a: Float[Array, "*a m k"], b: Float[Array, "*b n k"]) -> Float[Array, "*c m n"]:
    """a b^T."""
    return _nt(*_same_batch(a, b))


def tn(a: Float[Array, "*a k m"], b: Float[Array, "*b k n"]) -> Float[Array, "*c m n"]:
    """a^T b."""
    return _tn(*_same_batch(a, b))


@jax.custom_vjp
def _scaled(a, b, scale):
    return scale[..., None, :] * _dot(a, b, (1, 0))


def _scaled_bwd(kept, g):
    a, b, scale = kept
    back = _tn(a, g)
    return _nt(scale[..., None, :] * g, b), scale[..., None, :] * back, jnp.sum(b * back, axis=-2)


_scaled.defvjp(lambda a, b, scale: (_scaled(a, b, scale), (a, b, scale)), _scaled_bwd)


def scaled_nn(
    a: Float[Array, "*a m k"], b: Float[Array, "*b k n"], scale: Float[Array, "*s n"]
) -> Float[Array, "*c m n"]:
    """a b with its columns scaled; the gradient of the scale needs no product kept or redone."""
    a, b = _same_batch(a, b)
    return _scaled(a, b, jnp.broadcast_to(scale, (*a.shape[:-2], scale.shape[-1])))


@jax.custom_vjp
def gram(x: Float[Array, "*b k n"]) -> Float[Array, "*b n n"]:
    """x^T x; its gradient is one product, x (g + g^T), not two."""
    return _dot(x, x, (0, 0))


gram.defvjp(lambda x: (gram(x), x), lambda x, g: (_nn(x, g + jnp.swapaxes(g, -1, -2)),))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _solve(lower, right, named, dense):
    return _nt(right, invert_unit_lower(lower, dense=dense))


def _solve_fwd(lower, right, named, dense):
    inverse = invert_unit_lower(lower, dense=dense)
    if named:  # here: it is this value, not a copy of it, that the gradient needs
        inverse = checkpoint_name(inverse, INVERSE)
    solution = _nt(right, inverse)
    return solution, (inverse, solution)


def _solve_bwd(named, dense, kept, g):
    inverse, solution = kept
    right = _nn(g, inverse)
    return masked(-_tn(right, solution), lambda i, j: i > j), right


_solve.defvjp(_solve_fwd, _solve_bwd)


def solve_unit_lower(
    lower: Float[Array, "*a n n"],
    right: Float[Array, "*b m n"],
    *,
    named: bool = True,
    dense: bool = False,
) -> Float[Array, "*c m n"]:
    """X with X (I + L)^T = right, L the strict lower triangle of `lower`: rows are right sides.

    `named` says whether policies that save `INVERSE` save the one behind this;
    `dense`: see `invert_unit_lower`.
    """
    return _solve(*_same_batch(lower, right), named, dense)
