"""Batched matrix products whose gradients are products in the same layout.

JAX's own rule computes the gradient of a product's second operand transposed, and then copies it
into place; for small matrices the copies cost as much as the products. Here each gradient is one
product that comes out in the layout of its operand.
"""

from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels._linalg.derivatives import differentiable
from pallas_kernels._linalg.numerics import PLAIN, Form, dot
from pallas_kernels._linalg.triangular import invert_unit_lower, masked

# The name of the inverses in `solve_unit_lower` for checkpoint policies: they are expensive to
# recompute and small to store.
INVERSE = "invert_unit_lower"


def _product(contract: tuple[int, int], transpose: Any) -> Any:
    """The product, with `transpose(form, a, b, g)` the gradients of both operands."""

    def product(a, b, form):
        return dot(a, b, contract, form)

    def forward(a, b, form):
        a, b = form.operand(a), form.operand(b)  # kept rounded if the product rounds them
        return product(a, b, form), (a, b)

    def tangent(form, kept, tangents):
        (a, b), (of_a, of_b) = kept, tangents
        return product(of_a, b, form) + product(a, of_b, form)

    return differentiable(
        product, forward, tangent, lambda form, kept, g: transpose(form, *kept, g), static=1
    )


_nn: Any = _product((1, 0), lambda form, a, b, g: (_nt(g, b, form), _tn(a, g, form)))
_nt: Any = _product((1, 1), lambda form, a, b, g: (_nn(g, b, form), _tn(g, a, form)))
_tn: Any = _product((0, 0), lambda form, a, b, g: (_nt(b, g, form), _nn(a, g, form)))


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


def _scaled_forward(a, b, scale, form):
    a, b = form.operand(a), form.operand(b)
    return scale[..., None, :] * dot(a, b, (1, 0), form), (a, b, scale)


def _scaled_tangent(form, kept, tangents):
    (a, b, scale), (of_a, of_b, of_scale) = kept, tangents
    product = _nn(of_a, b, form) + _nn(a, of_b, form)
    return scale[..., None, :] * product + of_scale[..., None, :] * _nn(a, b, form)


def _scaled_transpose(form, kept, g):
    a, b, scale = kept
    # One product serves two gradients: scaled it is that of b, and its overlap with b, which is
    # sum_i g_in (a b)_in for column n, is that of the scale. The product a b is not needed again.
    back = _tn(a, g, form)
    of_scale = jnp.sum(b.astype(back.dtype) * back, axis=-2)
    return _nt(scale[..., None, :] * g, b, form), scale[..., None, :] * back, of_scale


_scaled = differentiable(
    lambda *given: _scaled_forward(*given)[0],
    _scaled_forward,
    _scaled_tangent,
    _scaled_transpose,
    static=1,
)


def scaled_nn(
    a: Float[Array, "*a m k"],
    b: Float[Array, "*b k n"],
    scale: Float[Array, "*s n"],
    form: Form = PLAIN,
) -> Float[Array, "*c m n"]:
    """a b with column n scaled by `scale[n]`."""
    a, b = _same_batch(a, b)
    return _scaled(a, b, jnp.broadcast_to(scale, (*a.shape[:-2], scale.shape[-1])), form)


def gram(x: Float[Array, "*b k n"], form: Form = PLAIN) -> Float[Array, "*b n n"]:
    """x^T x; its gradient is one product, x (g + g^T), where autodiff would take two."""
    return _gram(x, form)


def _gram_forward(x, form):
    x = form.operand(x)
    return dot(x, x, (0, 0), form), x


def _symmetric(g):
    return g + jnp.swapaxes(g, -1, -2)


_gram = differentiable(
    lambda x, form: dot(x, x, (0, 0), form),
    _gram_forward,
    lambda form, x, tangents: _symmetric(_tn(x, tangents[0], form)),
    lambda form, x, g: (_nn(x, _symmetric(g), form),),
    static=1,
)


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


def _solve_forward(lowers, rights, named, form):
    inverses = [form.operand(inverse) for inverse in _inverses(lowers, form)]
    # the name is given here, since it is this value, and no copy of it, that the gradient needs
    inverses = [
        checkpoint_name(inverse, INVERSE) if name else inverse
        for inverse, name in zip(inverses, named, strict=True)
    ]
    pairs = zip(rights, inverses, strict=True)
    solutions = tuple(_nt(right, inverse, form) for right, inverse in pairs)
    return solutions, (inverses, solutions)


def _solve_tangent(named, form, kept, tangents):
    # X (I + L)^T = right, so dX (I + L)^T = d right - X dL^T
    of_solutions = []
    for inverse, solution, of_lower, of_right in zip(*kept, *tangents, strict=True):
        of_lower = masked(of_lower, lambda i, j: i > j)
        of_solutions.append(_nt(of_right - _nt(solution, of_lower, form), inverse, form))
    return tuple(of_solutions)


def _solve_transpose(named, form, kept, gradients):
    # X = right T^T with T = (I + L)^-1. So right gets g T, and with dT = -T dL T the matrix L gets
    # -(g T)^T X: two products, and none of them forms dT.
    of_lowers, of_rights = [], []
    for inverse, solution, g in zip(*kept, gradients, strict=True):
        of_rights.append(_nn(g, inverse, form))
        product = -_tn(of_rights[-1], solution, form)
        of_lowers.append(masked(product, lambda i, j: i > j))
    return tuple(of_lowers), tuple(of_rights)


_solve = differentiable(
    lambda *given: _solve_forward(*given)[0],
    _solve_forward,
    _solve_tangent,
    _solve_transpose,
    static=2,
)


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
