"""Shampoo and SOAP against numpy, and the properties that define them (oracle 13)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestedjax import optim
from tests.optim.running import draw, run

T = 6


@pytest.fixture(autouse=True)
def wide(x64):
    """Oracles in float64; Adam's bias correction in optax raises a float to an int power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def root(m, power, eps):
    values, vectors = np.linalg.eigh(m)
    return (vectors * (np.maximum(values, 0) + eps) ** power) @ vectors.T


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_one_gradient_gives_the_polar_factor(shape):
    """Oracle 13: one-sided full-matrix AdaGrad with one gradient is U V^T, the Muon direction."""
    g = draw(*shape)
    tx = optim.scale_by_shampoo(sides="left", eps=1e-30)
    found, _ = tx.update(g, tx.init(g))
    u, _, vt = np.linalg.svd(np.asarray(g), full_matrices=False)
    if shape[0] >= shape[1]:  # as many outputs as rank: H is invertible
        np.testing.assert_allclose(found, u @ vt, atol=1e-9)
    both = optim.scale_by_shampoo(eps=1e-30)
    found, _ = both.update(g, both.init(g))
    np.testing.assert_allclose(found, u @ vt, atol=1e-6)


@pytest.mark.parametrize(
    ("b1", "b2", "sides", "refresh"),
    [(0.0, None, "both", 1), (0.9, 0.95, "both", 3), (0.9, None, "left", 1)],
)
def test_shampoo_against_numpy(b1, b2, sides, refresh):
    g, m, left, right, held = np.asarray(draw(T, 4, 3)), 0.0, 0.0, 0.0, None
    tx = optim.scale_by_shampoo(b1=b1, b2=b2, sides=sides, refresh=refresh, eps=1e-3)
    found, _, _ = run(tx, jnp.asarray(g[0]), jnp.asarray(g))
    power = -0.5 if sides == "left" else -0.25
    for t in range(T):
        u = g[t].T
        m = b1 * m + u
        old, new = (1.0, 1.0) if b2 is None else (b2, 1 - b2)
        left, right = old * left + new * u @ u.T, old * right + new * u.T @ u
        if t % refresh == 0:
            held = root(left, power, 1e-3), root(right, power, 1e-3)
        expected = held[0] @ m @ (held[1] if sides == "both" else np.eye(4))
        np.testing.assert_allclose(found[t].T, expected, atol=1e-10)


def test_soap_does_not_see_rotations_and_without_them_is_adam():
    g = draw(T, 4, 3)
    q, r = (np.linalg.qr(np.asarray(draw(n, n, seed=n)))[0] for n in (4, 3))
    tx = optim.scale_by_soap(refresh=2, eps=1e-3)
    plain, turned = (run(tx, x[0], x)[0] for x in (g, q @ g @ r))
    np.testing.assert_allclose(turned, q @ plain @ r, atol=1e-10)
    adam, _, _ = run(optax.scale_by_adam(0.95, 0.95, 1e-30), g[0], g[1:])
    unrotated, _, _ = run(optim.scale_by_soap(max_side=2, eps=1e-30), g[0], g)
    np.testing.assert_allclose(unrotated[1:], adam, atol=1e-10)
    assert not unrotated[0].any()


def test_what_is_no_matrix():
    params = {"b": draw(3)}
    grads = {"b": draw(T, 3, seed=1)}
    soap, _, _ = run(optim.scale_by_soap(eps=1e-30), params, grads)
    adam, _, _ = run(optax.scale_by_adam(0.95, 0.95, 1e-30), params, grads)
    np.testing.assert_allclose(soap["b"], adam["b"], atol=1e-10)
    shampoo, _, _ = run(optim.scale_by_shampoo(eps=0.0), params, grads)
    total = np.cumsum(np.asarray(grads["b"]) ** 2, 0)
    np.testing.assert_allclose(shampoo["b"], grads["b"] / np.sqrt(total), atol=1e-10)


def test_a_long_side_is_left_alone():
    g = draw(3, 4, 3)
    tx = optim.scale_by_shampoo(max_side=3, refresh=1, eps=1e-3)
    state = tx.init(g[0])
    assert state.left.shape == (3, 3) and isinstance(state.right, optax.MaskedNode)
    found, _ = jax.jit(tx.update)(g[0], state)
    u = np.asarray(g[0]).T
    np.testing.assert_allclose(found.T, root(u @ u.T, -0.25, 1e-3) @ u, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.shampoo(0.1, sides="right"), "sides='right' is not one of both, left"),
        (lambda: optim.soap(0.1, refresh=0), "refresh=0 must be an integer >= 1"),
        (
            lambda: optim.soap(0.1, factor_decay=2.0),
            "factor_decay=2.0 must be at least 0 and less than 1",
        ),
    ],
)
def test_mistakes_are_named(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("refresh", [1, 10])
def test_shampoo_stays_finite_for_twenty_thousand_steps(refresh):
    """Where its roots are stale and gradients turn to directions that those do not know."""
    start, target = (np.asarray(draw(2, 2, seed=i), np.float32) for i in (0, 1))
    curvature = np.array([[1.0], [100.0]], np.float32)
    product = np.array([[0.5, -1.0], [1.0, -2.0]], np.float32)
    gradients = {
        "quadratic": lambda w, t: curvature * (w - target),
        "rank one": lambda w, t: jnp.sin(t) * product,
    }

    def follow(gradient, rate):
        tx = optim.shampoo(rate, refresh=refresh, weight_decay=0.0)

        def body(held, t):
            w, state = held
            updates, state = tx.update(gradient(w, t), state, w)
            return (w + updates, state), jnp.abs(w).max()

        times = jnp.arange(20_000, dtype=jnp.float32)
        w = jnp.asarray(start)
        return jax.lax.scan(body, (w, tx.init(w)), times)

    with jax.enable_x64(False):
        for name, gradient in gradients.items():
            for rate in (0.5, 2.0):
                (last, _), sizes = jax.jit(lambda g=gradient, r=rate: follow(g, r))()
                assert np.isfinite(sizes).all() and sizes.max() < 10, name
                if name == "quadratic":
                    np.testing.assert_allclose(last, target, atol=1e-4)


def test_stale_roots_are_cut_to_what_fresh_ones_could_give():
    """A direction that the roots do not know would be multiplied by eps^(-1/2) = 1e3."""
    first, second = jnp.diag(jnp.array([1.0, 0.0])), jnp.diag(jnp.array([1.0, 1.0]))
    grads = jnp.stack([first, second])
    stale, fresh = (
        run(optim.scale_by_shampoo(refresh=refresh), grads[0], grads)[0] for refresh in (2, 1)
    )
    np.testing.assert_allclose(stale[0], fresh[0], atol=1e-12)
    assert np.linalg.norm(fresh[1]) < np.linalg.norm(stale[1]) <= np.sqrt(2) + 1e-9
