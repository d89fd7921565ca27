"""Stacks of linear systems against numpy, and against waiting for ever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._linalg.lapack import eigh, solve


@pytest.mark.parametrize("size", [1, 3, 16, 40])
def test_it_solves_systems_that_need_pivots(x64, size):
    rng = np.random.default_rng(size)
    a = rng.normal(size=(2, 3, size, size))
    a[..., 0, 0] = 0 if size > 1 else 1
    right = rng.normal(size=(2, 3, size, 2))
    np.testing.assert_allclose(
        solve(jnp.asarray(a), jnp.asarray(right)), np.linalg.solve(a, right), rtol=1e-9, atol=1e-9
    )


def test_both_modes_and_both_orders_are_those_of_the_inverse(x64):
    rng = np.random.default_rng(0)
    a, right = (jnp.asarray(rng.normal(size=(2, 5, n))) for n in (5, 3))
    sin = lambda f: lambda a, b: jnp.sum(jnp.sin(f(a, b)))  # noqa: E731
    ours, plain = sin(solve), sin(lambda a, b: jnp.linalg.inv(a) @ b)
    for mode in (jax.jacrev, jax.hessian):
        got, expected = (mode(f, argnums=(0, 1))(a, right) for f in (ours, plain))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-7), got, expected
        )


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_eigenvectors_diagonalise(shape, x64):
    a = np.random.default_rng(0).normal(size=(*shape, 5, 5))
    a = a + a.swapaxes(-1, -2)
    values, vectors = eigh(jnp.asarray(a))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(a), atol=1e-12)
    np.testing.assert_allclose(a @ vectors, vectors * values[..., None, :], atol=1e-12)


def test_many_batches_at_once_do_not_wait_for_each_other():
    """What hangs with `jnp.linalg` on two cores: independent batches in one program."""
    noise = jax.random.normal(jax.random.key(0), (6, 64, 32, 32))
    a = jnp.broadcast_to(jnp.eye(32), noise.shape) + noise / 64
    apart = jax.jit(lambda a: [(solve(x, x), eigh(x @ x.mT)[0]) for x in a])
    for _ in range(5):
        for x, values in jax.block_until_ready(apart(a)):
            np.testing.assert_allclose(x, np.broadcast_to(np.eye(32), x.shape), atol=1e-5)
            assert float(jnp.min(values)) > 0
