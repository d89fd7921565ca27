"""SOAP against a reference in NumPy, over 40 steps of three problems."""

import jax
import numpy as np
import pytest

from nestedjax import optim
from tests.optim.reference_soap import Soap
from tests.optim.running import draw, run

STEPS = 40


@pytest.fixture(autouse=True)
def wide(x64):
    """Oracles in float64; Adam's bias correction in optax raises a float to an int power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def least_squares():
    """Ill-conditioned: the inputs' scales go from 1 down to 0.01."""
    x = np.asarray(draw(32, 6)) * np.logspace(0, -2, 6)
    y = np.asarray(draw(32, 6, seed=1))
    return draw(6, 6, seed=2), lambda w: (w @ x.T - y.T) @ x / 32


def two_sided():
    """`1/2 <A (W - T) B, W - T>`, curved on both sides."""
    q, r = (np.linalg.qr(np.asarray(draw(5, 5, seed=n)))[0] for n in (3, 4))
    a, b = (m @ np.diag(np.logspace(0, -k, 5)) @ m.T for m, k in ((q, 2), (r, 3)))
    target = np.asarray(draw(5, 5, seed=5))
    return draw(5, 5, seed=6), lambda w: a @ (w - target) @ b


def logistic():
    """Not quadratic: regression of four labels, each with a probability of its own."""
    x = np.asarray(draw(24, 4, seed=7)) * np.array([3.0, 1.0, 0.3, 0.1])
    labels = (np.asarray(draw(24, 4, seed=8)) > 0) * 1.0
    return draw(4, 4, seed=9) * 0.1, lambda w: (jax.nn.sigmoid(x @ w.T) - labels).T @ x / 24


# Square matrices: the first gradient then has no null space, in which any basis would do.
@pytest.mark.parametrize("problem", [least_squares, two_sided, logistic])
@pytest.mark.parametrize(
    ("rate", "weight_decay"),
    # Departure 1 changes a step by rate^2 weight_decay, 4e-8 in the second row.
    [(3e-2, 0.0), (2e-3, 0.01)],
)
def test_is_the_reference_over_forty_steps(problem, rate, weight_decay):
    start, gradient = problem()
    settings = dict(b1=0.95, b2=0.9, factor_decay=0.8, eps=1e-8, weight_decay=weight_decay)
    reference, w, expected = Soap(**settings, frequency=4), np.asarray(start), []
    for _ in range(STEPS):
        w = reference.step(w, np.asarray(gradient(w)), rate)
        expected.append(w)
    tx = optim.soap(rate, refresh=4, axes=optim.MatrixAxes(1, 0), **settings)

    def body(held, _):
        w, state = held
        updates, state = tx.update(gradient(w), state, w)
        return (w + updates, state), w + updates

    _, found = jax.jit(lambda: jax.lax.scan(body, (start, tx.init(start)), None, length=STEPS))()
    np.testing.assert_array_equal(found[0], start)  # the first step moves nothing, decay included
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert np.abs(found[-1] - start).max() > 10 * rate


@pytest.mark.parametrize("refresh", [1, 3])
def test_a_stack_of_matrices_of_any_shape(refresh):
    """Each of a stack is the reference, where eps covers what the null spaces leave open."""
    settings, count = dict(b1=0.9, b2=0.95, factor_decay=0.8, eps=1e-3), 6
    grads = draw(count, 2, 4, 3)
    found, _, _ = run(optim.scale_by_soap(refresh=refresh, **settings), grads[0], grads)
    for which in range(2):
        reference, w = Soap(**settings, frequency=refresh, weight_decay=0.0), np.zeros((3, 4))
        for t in range(count):
            new = reference.step(w, np.asarray(grads[t, which]).T, 1.0)
            np.testing.assert_allclose(found[t, which].T, w - new, atol=1e-10)
            w = new
