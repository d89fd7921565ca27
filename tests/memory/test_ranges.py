"""Every number of a memory's constructors has a range, every token a shape; norms at extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax import memory as nm
from nestedjax.errors import require_range
from tests.memory import refusals
from tests.plain import refusals as refused


@pytest.fixture(scope="module")
def found():
    return refused("tests.memory.refusals")


@pytest.mark.parametrize("name", refusals.RANGES)
def test_a_number_outside_its_range_is_shown_with_the_range(found, name):
    _, ends, numbers = refusals.RANGES[name]
    for number in numbers:
        kind, message = found[f"{name}={number!r}"]
        assert kind == "ConfigError" and "\n" not in message, (number, message)
        assert f"={number!r} must be" in message and ends in message


@pytest.mark.parametrize("name", refusals.TOKEN_CASES)
def test_what_does_not_fit_is_one_line(found, name):
    kind, message = found[name]
    assert kind in ("ValueError", "ConfigError") and "\n" not in message, message
    assert refusals.TOKEN_CASES[name][1] in message


def test_the_ends_of_a_range():
    require_range("x", 0, 0, 1)
    require_range("x", np.float32(1), 0, 1)
    require_range("x", 1, 0, 1, closed="right")
    require_range("x", np.int32(3), 1, integer=True)
    for number, closed in ((0, "right"), (1, "left"), (0, "neither"), (1.5, "both"), ("1", "both")):
        with pytest.raises(ValueError, match=r"x=.* must be a number in"):
            require_range("x", number, 0, 1, closed=closed)


SIZES = [0.0, 1e-38, 1e-20, 1.0, 1e3, 1e20, 1e30]
DIRECTION = np.random.default_rng(0).normal(size=4)
VECTORS = {
    "l2_normalise": (nm.l2_normalise, lambda x: x / np.sqrt(np.sum(x**2) + 1e-12)),
    "elu_plus_one": (nm.elu_plus_one, lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))),
}


def sign_power(x, p):
    return np.sign(x) * np.abs(x) ** (p - 1)


def norm_of(x):
    return max(np.linalg.norm(x), 1e-300)


ERRORS = {
    "l2": (nm.l2(), lambda r: r),
    "lp 1": (nm.lp(1.0), np.sign),
    "lp 1.5": (nm.lp(1.5), lambda r: sign_power(r, 1.5)),
    "lp 2": (nm.lp(2.0), lambda r: r),
    "lp 3": (nm.lp(3.0), lambda r: sign_power(r, 3)),
    "smooth_lp": (nm.smooth_lp(1.5), lambda r: np.tanh(10 * r) * (r**2 + 1e-6) ** 0.25),
    "huber": (nm.huber(0.7), lambda r: np.clip(r, -0.7, 0.7)),
    "huber_norm": (nm.huber_norm(0.7), lambda r: r * min(1.0, 0.7 / norm_of(r))),
    "huber_mixture": (
        nm.huber_mixture(0.7),
        lambda r: r if np.linalg.norm(r) <= 0.7 else 0.7 * np.sign(r),
    ),
    "robust": (nm.robust(0.3), lambda r: r + 0.3 * r / norm_of(r)),
}
VECTORS |= {
    f"{name} error": (lambda x, o=o: o.error(x, jnp.zeros_like(x), None), expected)
    for name, (o, expected) in ERRORS.items()
}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("size", SIZES)
def test_vectors_at_extremes(name, size):
    """In float32 as float64 has it, wherever float32 has the number; gradients are finite there."""
    function, expected = VECTORS[name]
    x = jnp.asarray(DIRECTION * size, jnp.float32)
    wide = expected(np.asarray(x, np.float64))
    if np.max(np.abs(wide)) > float(jnp.finfo(jnp.float32).max):
        pytest.skip("float32 has no such number")
    largest = max(np.max(np.abs(wide)), 1e-30)
    if 0 < size < 1e-30:  # denormal numbers count as 0
        wide, largest = wide, max(largest, 1.0)
        assert np.all(np.isfinite(function(x)))
    else:
        np.testing.assert_allclose(function(x), wide, rtol=1e-5, atol=1e-6 * largest)
    assert np.all(np.isfinite(jax.jacrev(function)(x)))


def test_lp_has_the_derivative_of_l2_also_where_nothing_is_left():
    zero = jnp.zeros(3)
    jacobian = jax.jacrev(lambda x: nm.lp(2.0).error(x, zero, None))(zero)
    np.testing.assert_array_equal(jacobian, np.eye(3))


LINKS = {
    "kl": nm.kl(2.0),
    "lq 4": nm.lq(4.0),
    "lq 1.5": nm.lq(1.5),
    "lq 1.01": nm.lq(1.01),
    "lq_printed 4": nm.lq_printed(4.0),
    "bregman_sigmoid": nm.bregman_sigmoid(),
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("size", [*SIZES[:3], *SIZES[4:]])
def test_links_at_extremes(name, size):
    link = LINKS[name].link
    one = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)
    weights = link(one * size)
    assert np.all(np.isfinite(weights))
    assert np.all(np.isfinite(jax.jacrev(link)(one * size)))
    if name.startswith("lq ") and size > 1:  # homogeneous of degree 1
        np.testing.assert_allclose(weights, link(one) * np.float32(size), rtol=1e-3)
