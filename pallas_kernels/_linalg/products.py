"""Batched matrix products whose gradients are products in the same layout.

JAX's own rule computes the gradient of a product's second operand transposed, and then copies it
into place; for small matrices the copies cost as much as the products. Here each gradient is one
product that comes out in the layout of its operand. Reverse mode only, of any order.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels._linalg.numerics import PLAIN, Form, dot
from pallas_kernels._linalg.triangular import invert_unit_lower, masked

# The name of the inverses in `solve_unit_lower` for checkpoint policies: they are expensive to
# recompute and small to store.
INVERSE = "invert_unit_lower"


def _product(contract: tuple[int, int]) -> Any:
    return jax.custom_vjp(lambda a, b, form: dot(a, b, contract, form), nondiff_argnums=(2,))


_nn, _nt, _tn = _product((1, 0)), _product((1, 1)), _product((0, 0))


def _keep(form_of_product):
    """The forward rule: keep both operands, rounded if the product rounds them."""

    def forward(a, b, form):
        a, b = form.operand(a), form.operand(b)
        return form_of_product(a, b, form), (a, b)

    return forward


_nn.defvjp(_keep(_nn), lambda form, kept, g: (_nt(g, kept[1], form), _tn(kept[0], g, form)))
_nt.defvjp(_keep(_nt), lambda form, kept, g: (_nn(g, kept[1], form), _tn(g, kept[0], form)))
_tn.defvjp(_keep(_tn), lambda form, kept, g: (_nt(kept[1], g, form), _nn(kept[0], g, form)))


def _same_batch(a, b):
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return tuple(jnp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, b))


def nn(
    a: Float[Array, "*a m k"], b: Float[Array, "*b k n"], form: Form = PLAIN
) -> Float[Array, "*c m n"]:
    """a b; leading dimensions of size one broadcast, also in `nt` and `tn`."""
    return _nn(*_same_batch(a, b), form)


def nt(
    a: Float[Array, "*a m k"], b: Float[Array, "*b n k"], form: Form = PLAIN
) -> Float[Array, "*c m n"]:
    """a b^T."""
    return _nt(*_same_batch(a, b), form)


def tn(
    a: Float[Array, "*a k m"], b: Float[Array, "*b k n"], form: Form = PLAIN
) -> Float[Array, "*c m n"]:
    """a^T b."""
    return _tn(*_same_batch(a, b), form)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scaled(a, b, scale, form):
    return scale[..., None, :] * dot(a, b, (1, 0), form)


def _scaled_fwd(a, b, scale, form):
    a, b = form.operand(a), form.operand(b)
    return _scaled(a, b, scale, form), (a, b, scale)


def _scaled_bwd(form, kept, g):
    a, b, scale = kept
    # One product serves two gradients: scaled it is that of b, and its overlap with b, which is
    # sum_i g_in (a b)_in for column n, is that of the scale. The product a b is not needed again.
    back = _tn(a, g, form)
    of_scale = jnp.sum(b.astype(back.dtype) * back, axis=-2)
    return _nt(scale[..., None, :] * g, b, form), scale[..., None, :] * back, of_scale


_scaled.defvjp(_scaled_fwd, _scaled_bwd)


def scaled_nn(
    a: Float[Array, "*a m k"],
    b: Float[Array, "*b k n"],
    scale: Float[Array, "*s n"],
    form: Form = PLAIN,
) -> Float[Array, "*c m n"]:
    """a b with column n scaled by `scale[n]`."""
    a, b = _same_batch(a, b)
    return _scaled(a, b, jnp.broadcast_to(scale, (*a.shape[:-2], scale.shape[-1])), form)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gram(x: Float[Array, "*b k n"], form: Form = PLAIN) -> Float[Array, "*b n n"]:
    """x^T x; its gradient is one product, x (g + g^T), where autodiff would take two."""
    return dot(x, x, (0, 0), form)


def _gram_fwd(x, form):
    x = form.operand(x)
    return gram(x, form), x


gram.defvjp(_gram_fwd, lambda form, x, g: (_nn(x, g + jnp.swapaxes(g, -1, -2), form),))


def _inverses(lowers, form: Form):
    """The inverse of each. A kernel inverts all at once: small products in turn would wait."""
    if not form.dense or len(lowers) == 1:
        return [invert_unit_lower(lower, form) for lower in lowers]
    size = lowers[0].shape[-1]
    stacks = [lower.reshape(-1, size, size) for lower in lowers]
    found = invert_unit_lower(jnp.concatenate(stacks), form)
    ends = [sum(len(stack) for stack in stacks[: i + 1]) for i in range(len(stacks))]
    parts = [found[end - len(stack) : end] for stack, end in zip(stacks, ends, strict=True)]
    return [part.reshape(lower.shape) for part, lower in zip(parts, lowers, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _solve(lowers, rights, named, form):
    return _solve_fwd(lowers, rights, named, form)[0]


def _solve_fwd(lowers, rights, named, form):
    inverses = [form.operand(inverse) for inverse in _inverses(lowers, form)]
    # the name is given here, since it is this value, and no copy of it, that the gradient needs
    inverses = [
        checkpoint_name(inverse, INVERSE) if name else inverse
        for inverse, name in zip(inverses, named, strict=True)
    ]
    pairs = zip(rights, inverses, strict=True)
    solutions = tuple(_nt(right, inverse, form) for right, inverse in pairs)
    return solutions, (inverses, solutions)


def _solve_bwd(named, form, kept, gradients):
    # X = right T^T with T = (I + L)^-1. So right gets g T, and with dT = -T dL T the matrix L gets
    # -(g T)^T X: two products, and none of them forms dT.
    of_lowers, of_rights = [], []
    for inverse, solution, g in zip(*kept, gradients, strict=True):
        of_rights.append(_nn(g, inverse, form))
        product = -_tn(of_rights[-1], solution, form)
        of_lowers.append(masked(product, lambda i, j: i > j))
    return tuple(of_lowers), tuple(of_rights)


_solve.defvjp(_solve_fwd, _solve_bwd)


def solve_unit_lower(
    lower: Float[Array, "*a n n"],
    right: Float[Array, "*b m n"],
    *,
    named: bool = True,
    form: Form = PLAIN,
) -> Float[Array, "*c m n"]:
    """X with X (I + L)^T = right, L the strict lower triangle of `lower`; a right side is a row.

    `named` says whether checkpoint policies that save `INVERSE` save this inverse.
    """
    return solve_unit_lowers([(lower, right)], named=(named,), form=form)[0]


def solve_unit_lowers(systems, *, named: tuple[bool, ...], form: Form = PLAIN):
    """`solve_unit_lower` of each pair (lower, right); all have the same number of tokens."""
    lowers, rights = zip(*(_same_batch(*system) for system in systems), strict=True)
    return _solve(lowers, rights, named, form)
