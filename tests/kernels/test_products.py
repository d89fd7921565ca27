"""Products and solves with gradients of their own, against autodiff of plain jnp in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._linalg import products


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def plain_solve(lower, right):
    """Right sides as rows, with a dense inverse: shares nothing with the substitution."""
    n = lower.shape[-1]
    unit = jnp.broadcast_to(jnp.eye(n), lower.shape) + jnp.tril(lower, -1)
    return right @ jnp.swapaxes(jnp.linalg.inv(unit), -1, -2)


def swap(a):
    return jnp.swapaxes(a, -1, -2)


CASES = {
    "nn": (products.nn, lambda a, b: a @ b, (2, 3, 5), (2, 5, 4)),
    "nn shared": (products.nn, lambda a, b: a @ b, (2, 1, 3, 5), (2, 3, 5, 4)),
    "nt": (products.nt, lambda a, b: a @ swap(b), (2, 3, 5), (2, 4, 5)),
    "tn": (products.tn, lambda a, b: swap(a) @ b, (2, 5, 3), (2, 5, 4)),
    "tn shared": (products.tn, lambda a, b: swap(a) @ b, (2, 3, 5, 3), (1, 1, 5, 4)),
    "scaled": (
        products.scaled_nn,
        lambda a, b, s: s[..., None, :] * (a @ b),
        (2, 3, 5),
        (2, 5, 4),
        (2, 4),
    ),
    "scaled shared": (
        products.scaled_nn,
        lambda a, b, s: s[..., None, :] * (a @ b),
        (2, 3, 3, 5),
        (2, 3, 5, 4),
        (2, 1, 4),
    ),
    "gram": (products.gram, lambda x: swap(x) @ x, (2, 5, 4)),
    "solve": (products.solve_unit_lower, plain_solve, (2, 4, 4), (2, 3, 4)),
    "solve merged": (
        lambda lower, right: products.solve_unit_lower(0.1 * lower, right),
        lambda lower, right: plain_solve(0.1 * lower, right),
        (1, 19, 19),
        (1, 3, 19),
    ),
    "solve shared": (products.solve_unit_lower, plain_solve, (2, 1, 4, 4), (2, 3, 3, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_of_first_and_second_order(x64, case):
    form, plain, *shapes = CASES[case]
    given = tuple(draw(i, *shape) for i, shape in enumerate(shapes))
    which = tuple(range(len(given)))

    def both(function):
        def loss(*values):
            return jnp.sum(jnp.sin(function(*values)))

        def slope(*values):
            gradients = jax.grad(loss, which)(*values)
            return sum(jnp.sum(jnp.cos(g)) for g in gradients)

        every = (loss, jax.grad(loss, which), jax.grad(slope, which))
        return jax.jit(lambda *values: [f(*values) for f in every])(*given)

    for actual, expected in zip(*map(jax.tree.leaves, (both(form), both(plain))), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-10)
        assert float(jnp.max(jnp.abs(expected))) > 0


def test_the_solution_is_what_a_policy_saves(x64):
    """Saved by name, the backward pass inverts no second time; unnamed or unsaved, it does."""
    lower, right = draw(0, 4, 4), draw(1, 3, 4)

    def products_of(named, policy):
        def loss(lower, right):
            return jnp.sum(jnp.sin(products.solve_unit_lower(lower, right, named=named)))

        gradient = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1))
        return str(jax.make_jaxpr(gradient)(lower, right)).count("dot_general[")

    saves = jax.checkpoint_policies.save_only_these_names(products.INVERSE)
    assert products_of(True, saves) < products_of(True, None) == products_of(False, saves)


@pytest.mark.parametrize("n", [1, 3, 16, 17, 64, 100])
def test_the_inverse_of_correlated_keys_is_numpys(n):
    """In float32, with keys so alike that doubling over the whole chunk would overflow."""
    rng = np.random.default_rng(n)
    keys = rng.normal(size=(n, 8)) * 0.3 + 1.0
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    lower = np.tril(keys @ keys.T, -1)
    right = rng.normal(size=(5, n))
    expected = np.linalg.solve(np.eye(n) + lower, right.T).T
    actual = products.solve_unit_lower(
        jnp.asarray(lower[None], jnp.float32), jnp.asarray(right[None], jnp.float32)
    )
    np.testing.assert_allclose(actual[0], expected, atol=2e-5 * np.abs(expected).max())
