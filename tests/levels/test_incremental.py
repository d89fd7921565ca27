"""Levels with notes on their unfinished period."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax import levels
from tests.levels.systems import incremental_level, make_params, running_level, tick_chain

SIZE, PERIOD = 3, 4


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    params = make_params(rng, "incremental", SIZE)
    return incremental_level("level", PERIOD), params, rng.standard_normal((14, SIZE)).astype("f4")


@pytest.mark.parametrize(
    "cuts", [range(1, 14), [2, 3, 4, 5, 6], [1, 2, 6, 7, 13], [5, 6, 7, 8, 9, 10]]
)
def test_a_carry_goes_from_tokens_to_chunks_and_back(case, cuts):
    level, params, x = case
    run = jax.jit(lambda carry, x: levels.run(level, params, carry, x))
    carry, outputs = levels.start(level, params, x), []
    for piece in np.split(x, list(cuts)):
        y, carry = run(carry, piece)
        outputs.append(y)
    expected, ticks = tick_chain([("running", PERIOD)], [params], x)
    np.testing.assert_allclose(np.concatenate(outputs), expected, atol=1e-5)
    np.testing.assert_allclose(carry.state, ticks[0].state, atol=1e-5)


def test_what_is_pending(case):
    level, params, x = case
    run = lambda carry, x: levels.run(level, params, carry, x)[1]  # noqa: E731
    start = levels.start(level, params, x)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(start.pending))
    one = run(start, x[:1])
    assert bool(one.pending.kept) and np.any(one.pending.notes)
    np.testing.assert_array_equal(one.pending.tokens[0], x[0])
    many = run(start, x[:2])
    assert not bool(many.pending.kept) and not np.any(many.pending.notes)
    full = run(run(start, x[:3]), x[3:4])  # a write leaves nothing behind
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(full.pending))
    kind = lambda carry: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), carry)  # noqa: E731
    assert kind(start) == kind(one) == kind(many) == kind(full)


def test_boundaries_resets_and_notes(case):
    """Notes of another context are never read."""
    level, params, x = case
    run = lambda carry, x, **options: levels.run(level, params, carry, x, **options)  # noqa: E731
    carry = levels.start(level, params, x)
    for t in range(6):
        _, carry = run(carry, x[t : t + 1])
    fresh = run(level.init(params), x[6:9])[0]
    again = levels.reset(level, params, carry, np.asarray(True))
    outputs = []
    for t in range(6, 9):
        y, again = run(again, x[t : t + 1])
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs), fresh, atol=1e-6)

    for t in range(6, 8):
        _, carry = run(carry, x[t : t + 1])
    resumed = levels.resumed(levels.at_boundary(carry), levels.start(level, params, x))
    for held in (carry, resumed):
        y, _ = run(held, x[8:9])
        np.testing.assert_allclose(y, run(level.init(params), x[:9])[0][8:], atol=1e-6)
    y, _ = run(carry, x[8:9], reset=np.asarray([True]))
    np.testing.assert_allclose(y, run(level.init(params), x[8:9])[0], atol=1e-6)


def test_gradients_through_tokens_and_chunks(x64):
    rng = np.random.default_rng(1)
    params = make_params(rng, "incremental", SIZE, np.float64)
    level, x = incremental_level("level", PERIOD), rng.standard_normal((11, SIZE))

    def loss(params, cuts):
        carry, total = levels.start(level, params, x), 0.0
        for piece in np.split(x, cuts):
            y, carry = levels.run(level, params, carry, piece)
            total = total + jnp.sum(jnp.sin(3 * y))
        return total

    expected = jax.grad(loss)(params, [])
    for cuts in (list(range(1, 11)), [2, 3, 7, 8]):
        found = jax.grad(loss)(params, cuts)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, expected)


def test_mistakes_and_a_period_of_one():
    options = {"start": lambda p, s: s, "token": lambda p, s, n, x: (n, x)}
    level = running_level("level", 1)
    assert levels.incremental(level, **options) is level
    with pytest.raises(ValueError, match="'level' has no period of its own"):
        levels.incremental(level._replace(period=None), **options)
    with pytest.raises(ValueError, match="'flow' has no period of its own"):
        levels.incremental(levels.flow(level), **options)
