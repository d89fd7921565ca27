"""A function under nested `jax.vmap`s, values and gradients, against the loops that they stand for.

The mapped axes have different sizes, so that one which ends up in the wrong place has the wrong
shape: XLA reorders the leading axes of products, and has aborted over it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

SIZES = (2, 3, 4)  # of the mapped axes, the outermost first


def check_vmaps(function, draw, *, depths=(1, 2, 3), gradient=True, **tolerance):
    """Compare `function` under one, two and three `jax.vmap`s with a loop.

    Args:
      function: of one tree of arrays, to a tree of arrays.
      draw: `draw(i)` is the i-th of its arguments: different numbers, the same shapes.
      depths: how many maps to nest.
      gradient: also compare the gradient with respect to the floating-point leaves.
      tolerance: of `np.testing.assert_allclose`.
    """
    both = partial(_value_and_gradient, function) if gradient else function
    count = int(np.prod(SIZES[: max(depths)]))
    given = [draw(i) for i in range(count)]
    alone = jax.jit(both)
    expected = [alone(x) for x in given]
    for depth in depths:
        shape = SIZES[:depth]
        mapped = both
        for _ in shape:
            mapped = jax.vmap(mapped)
        found = jax.jit(mapped)(_stacked(given, shape))
        jax.tree.map(partial(_same, tolerance), found, _stacked(expected, shape))


def _value_and_gradient(function, x):
    leaves, tree = jax.tree.flatten(x)
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def loss(chosen):
        filled = list(leaves)
        for i, leaf in zip(floating, chosen, strict=True):
            filled[i] = leaf
        value = function(jax.tree.unflatten(tree, filled))
        outputs = [a for a in jax.tree.leaves(value) if jnp.issubdtype(a.dtype, jnp.floating)]
        return sum(jnp.sum(jnp.sin(a)) for a in outputs), value

    gradient, value = jax.grad(loss, has_aux=True)([leaves[i] for i in floating])
    return value, gradient


def _stacked(trees, shape):
    trees = trees[: int(np.prod(shape))]
    return jax.tree.map(lambda *a: np.stack(a).reshape(*shape, *a[0].shape), *trees)


def _same(tolerance, found, expected):
    np.testing.assert_allclose(found, expected, **tolerance)
