"""`run`, `start`, `stream` and `reset` on plain levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax import levels
from tests.levels.systems import gradient_level, make_params, running_level, tick_chain

SIZE = 3


def tokens(rng, length, dtype=np.float32):
    return rng.standard_normal((length, SIZE)).astype(dtype)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("kind,make", [("gradient", gradient_level), ("running", running_level)])
def test_whole_equals_ticks(kind, make, length):
    rng = np.random.default_rng(0)
    params, x = make_params(rng, kind, SIZE), tokens(rng, length)
    level = make("level", 4)
    y, carry = levels.run(level, params, level.init(params), x)
    assert y.shape == (length, SIZE)
    assert int(carry.position) == length
    if length:
        expected, ticks = tick_chain([(kind, 4)], [params], x)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        np.testing.assert_allclose(carry.state, ticks[0].state, atol=1e-5)
    left = x[length // 4 * 4 :]
    np.testing.assert_array_equal(carry.pending[: len(left)], left)
    assert not np.any(carry.pending[len(left) :])


def test_fresh_path_has_no_masked_step():
    """Two scans would mean a wasted one; a select would mean a masked one."""
    level = gradient_level("level", 4)
    params = make_params(np.random.default_rng(0), "gradient", SIZE)
    run = lambda x: levels.run(level, params, level.init(params), x)  # noqa: E731
    text = str(jax.make_jaxpr(run)(jnp.zeros((11, SIZE))))
    assert text.count("scan[") == 1 and "length=2" in text
    assert "select_n" not in text
    assert "scan[" not in str(jax.make_jaxpr(run)(jnp.zeros((3, SIZE))))


def test_whole_periods_may_be_one_call():
    """`whole` is used where it is given, is told where documents begin, and gives what steps do."""
    level, calls = running_level("level", 4), []

    def whole(params, state, x, begins):
        calls.append((x.shape, begins))
        outputs = []
        for at in range(0, x.shape[0], 4):
            if begins is not None:
                state = levels.reset(level, params, state, begins[at // 4])
            state, y = level.step(params, state, x[at : at + 4])
            outputs.append(y)
        return state, jnp.concatenate(outputs)

    rng = np.random.default_rng(0)
    params, x = make_params(rng, "running", SIZE), tokens(rng, 14)
    in_one = level._replace(whole=whole)
    for reset in (None, np.arange(14) == 8):
        found, expected = (
            levels.run(system, params, level.init(params), x, reset=reset)
            for system in (in_one, level)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    assert [shape for shape, _ in calls] == [(12, SIZE)] * 2
    assert calls[0][1] is None and calls[1][1].tolist() == [False, False, True]


def test_stream_yields_what_run_returns():
    rng = np.random.default_rng(1)
    params, x = make_params(rng, "running", SIZE), tokens(rng, 9)
    level = running_level("level", 4)
    whole, end = levels.run(level, params, level.init(params), x)
    pieces = list(levels.stream(level, params, level.init(params), [x[:1], x[1:2], x[2:7], x[7:]]))
    np.testing.assert_allclose(jnp.concatenate([y for y, _ in pieces]), whole, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), pieces[-1][1], end)


def test_input_may_be_a_pytree_of_several_dtypes():
    level = levels.read_write(
        "counts",
        2,
        init=lambda params: jnp.zeros((), jnp.int32),
        read=lambda params, state, x: {"id": x["id"] + state, "value": x["value"]},
        write=lambda params, state, x: state + x["id"].sum(),
    )
    x = {"id": jnp.arange(5, dtype=jnp.int32), "value": jnp.ones((5, 2), jnp.bfloat16)}
    carry = levels.start(level, None, x)
    outputs = []
    for i in range(5):
        piece = {name: leaf[i : i + 1] for name, leaf in x.items()}
        y, carry = levels.run(level, None, carry, piece)
        outputs.append(y["id"])
    np.testing.assert_array_equal(jnp.concatenate(outputs), [0, 1, 3, 4, 10])
    assert y["value"].dtype == jnp.bfloat16


def test_a_period_of_one_and_a_frozen_level():
    rng = np.random.default_rng(2)
    params, x = make_params(rng, "gradient", SIZE), tokens(rng, 6)
    level = gradient_level("every token", 1)
    expected, _ = tick_chain([("gradient", 1)], [params], x)
    carry = levels.start(level, params, x)
    first, carry = levels.run(level, params, carry, x[:2])
    rest, carry = levels.run(level, params, carry, x[2:])
    np.testing.assert_allclose(jnp.concatenate([first, rest]), expected, atol=1e-5)
    assert int(carry.position) == 6


def test_mistakes_are_named():
    level = gradient_level("memory", 4)
    params = make_params(np.random.default_rng(0), "gradient", SIZE)
    state, x = level.init(params), jnp.zeros((8, SIZE))
    with pytest.raises(ValueError, match="memory.*2 tokens after.*period 4.*multiple of 4"):
        levels.run(level, params, state, x, reset=np.arange(8) == 6)
    with pytest.raises(ValueError, match="one bool per token: 8"):
        levels.run(level, params, state, x, reset=np.zeros(7, bool))
    with pytest.raises(ValueError, match="period must be None or an integer"):
        levels.run(level._replace(period=0), params, state, x)
    with pytest.raises(ValueError, match="same leading token axis"):
        levels.run(level, params, state, {"a": x, "b": x[:4]})
    with pytest.raises(ValueError, match="needs both"):
        levels.read_write("frozen", 4, init=level.init, read=lambda p, s, x: x)


def test_a_batch_is_refused_where_the_level_says_its_axes():
    """Read as if the batch were the tokens, it would give other numbers without an error."""
    level = gradient_level("memory", 4)._replace(ndim=2)
    params = make_params(np.random.default_rng(0), "gradient", SIZE)
    batch = jnp.zeros((3, 8, SIZE))
    with pytest.raises(ValueError, match=r"memory.*\(3, 8, \d\).*run_batch or jax.vmap"):
        levels.run(level, params, level.init(params), batch)
    chain = levels.chain(level)
    with pytest.raises(ValueError, match="jax.vmap"):
        levels.run(chain, (params,), chain.init((params,)), batch)
    with pytest.raises(ValueError, match="3 axes.*jax.vmap"):
        levels.run(levels.per_head(level), params, None, jnp.zeros((2, 8, 3, SIZE)))
    y, _ = levels.run_batch(level, params, None, batch)
    assert y.shape == batch.shape


@pytest.mark.parametrize("wrap", [lambda level: level, levels.chain], ids=["level", "chain"])
def test_a_document_inside_a_period_is_never_read_in_silence(wrap):
    """One rule: refused where it is known, not a number where only the running program sees it."""
    level = wrap(gradient_level("memory", 4))
    params = make_params(np.random.default_rng(0), "gradient", SIZE)
    params = params if level.parts == () else (params,)
    x = jnp.ones((8, SIZE))
    run = jax.jit(lambda state, x, reset: levels.run(level, params, state, x, reset=reset))
    fine, inside = np.arange(8) == 4, np.arange(8) == 6
    for place in (0, 3):  # the same, on the grid of the context that the carry belongs to
        state = level.init(params)
        if place:
            state = levels.run(level, params, state, x[:place])[1]
        good, bad = np.roll(fine, -place), np.roll(inside, -place)
        with pytest.raises(ValueError, match="memory|chain.*period 4"):
            levels.run(level, params, state, x, reset=bad)
        y, carry = run(state, x, jnp.asarray(bad))
        assert np.isnan(y).all()
        assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(carry.state))
        expected, _ = levels.run(level, params, state, x, reset=good.tolist())
        np.testing.assert_allclose(run(state, x, jnp.asarray(good))[0], expected, atol=1e-6)


def test_in_a_batch_only_the_sequence_with_the_fault_is_not_a_number():
    level = gradient_level("memory", 4)
    params = make_params(np.random.default_rng(0), "gradient", SIZE)
    x, resets = jnp.ones((2, 8, SIZE)), np.stack([np.arange(8) == 4, np.arange(8) == 6])
    with pytest.raises(ValueError, match="2 tokens after a boundary of the period 4"):
        levels.run_batch(level, params, None, x, reset=resets)
    jitted = jax.jit(lambda resets: levels.run_batch(level, params, None, x, reset=resets)[0])
    y = jitted(resets)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()
