"""`flow`, `parallel` and `nested`, and what the compositions refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax import levels
from tests.levels.systems import Tick, gradient_level, make_params, running_level, tick_chain

SIZE = 3


def tokens(length, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((length, SIZE)).astype(dtype)


def in_pieces(system, params, x, cuts, resets=None):
    carry, outputs = levels.start(system, params, x), []
    flags = [None] * (len(cuts) + 1) if resets is None else np.split(resets, cuts)
    run = jax.jit(lambda carry, piece, flag: levels.run(system, params, carry, piece, reset=flag))
    for piece, flag in zip(np.split(x, cuts), flags, strict=True):
        y, carry = run(carry, piece, flag)
        outputs.append(y)
    return np.concatenate(outputs), carry


def assert_same(a, b, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


SPLITS = [range(1, 29), [5, 6, 14]]


@pytest.mark.parametrize("cuts", SPLITS)
def test_flow_keeps_the_given_order(cuts):
    rng = np.random.default_rng(0)
    params = [make_params(rng, "gradient", SIZE), make_params(rng, "running", SIZE)]
    slow_first = levels.flow(gradient_level("slow", 8), running_level("fast", 2))
    x = tokens(29)
    expected, _ = tick_chain([("gradient", 8), ("running", 2)], params, x)
    y, end = levels.run(slow_first, params, slow_first.init(params), x)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    z, carry = in_pieces(slow_first, params, x, cuts)
    np.testing.assert_allclose(z, expected, atol=2e-5)
    assert_same(carry, end)


@pytest.mark.parametrize("weights", [None, np.array([0.25, -2.0], np.float32)])
@pytest.mark.parametrize("cuts", SPLITS)
def test_parallel_sums_what_its_levels_say(weights, cuts):
    rng = np.random.default_rng(0)
    params = {
        name: make_params(rng, kind, SIZE) for name, kind in [("a", "gradient"), ("b", "running")]
    }
    system = levels.parallel(gradient_level("a", 4), running_level("b", 8))
    x, scale = tokens(29), (1.0, 1.0) if weights is None else weights
    first, _ = tick_chain([("gradient", 4)], [params["a"]], x)
    second, _ = tick_chain([("running", 8)], [params["b"]], x)
    if weights is not None:
        params["aggregate"] = weights
    y, end = levels.run(system, params, system.init(params), x)
    np.testing.assert_allclose(y, scale[0] * first + scale[1] * second, atol=2e-5)
    z, carry = in_pieces(system, params, x, cuts)
    np.testing.assert_allclose(z, y, atol=2e-5)
    assert_same(carry, end)
    stepped, z = system.step(params, system.init(params), x[:8])
    np.testing.assert_allclose(z, y[:8], atol=2e-5)


def test_parallel_takes_an_aggregator():
    system = levels.parallel(
        gradient_level("a", 4),
        gradient_level("b", 4),
        aggregate=lambda weights, outputs: jnp.concatenate(outputs, axis=1) @ weights,
    )
    rng = np.random.default_rng(0)
    pick = np.concatenate([np.zeros((SIZE, SIZE)), np.eye(SIZE)]).astype(np.float32)
    params = (make_params(rng, "gradient", SIZE), make_params(rng, "gradient", SIZE), pick)
    x = tokens(9)
    y, _ = levels.run(system, params, system.init(params), x)
    expected, _ = tick_chain([("gradient", 4)], [params[1]], x)
    np.testing.assert_allclose(y, expected, atol=2e-5)  # oracle 46: one-hot picks the block


# A slow running level over a fast gradient level, whose matrix is the slow vector's outer product.


def make_nested(fast_period=2, slow_period=8):
    def reinit(slow_params, slow_state):
        return slow_params["spread"] * jnp.outer(
            jnp.tanh(slow_state), jnp.ones(SIZE, slow_state.dtype)
        )

    fast, slow = gradient_level("fast", fast_period), running_level("slow", slow_period)
    return levels.nested(fast, slow, reinit)


def nested_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    slow = make_params(rng, "running", SIZE, dtype) | {"spread": np.asarray(0.4, dtype)}
    return {"fast": make_params(rng, "gradient", SIZE, dtype), "slow": slow}


def tick_nested(params, x, fast_period=2, slow_period=8):
    fast = Tick("gradient", fast_period, params["fast"])
    slow = Tick("running", slow_period, params["slow"])
    outputs = []
    for i, token in enumerate(x):
        if i % slow_period == 0:
            fast.state = params["slow"]["spread"] * np.outer(np.tanh(slow.state), np.ones(SIZE))
        outputs.append(slow(fast(token)))
    return np.stack(outputs), fast, slow


@pytest.mark.parametrize("length", [7, 8, 29])
def test_nested_equals_ticks(length):
    system, params, x = make_nested(), nested_params(), tokens(length)
    y, carry = levels.run(system, params, system.init(params), x)
    expected, fast, slow = tick_nested(params, x)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(carry.state[1].state, slow.state, atol=2e-5)
    if length % 8:
        np.testing.assert_allclose(carry.state[0].state, fast.state, atol=2e-5)


@pytest.mark.parametrize("cuts", SPLITS)
@pytest.mark.parametrize("periods", [(2, 8), (4, 4)])
def test_nested_equals_any_split(cuts, periods):
    system, params, x = make_nested(*periods), nested_params(), tokens(29)
    y, end = levels.run(system, params, system.init(params), x)
    np.testing.assert_allclose(y, tick_nested(params, x, *periods)[0], atol=2e-5)
    z, carry = in_pieces(system, params, x, cuts)
    np.testing.assert_allclose(z, y, atol=2e-5)
    assert_same(carry, end)
    nothing, same = levels.run(system, params, carry, x[:0])
    assert nothing.shape == (0, SIZE)
    assert_same(same, carry, atol=0)


@pytest.mark.parametrize("cuts", [[11, 12], range(1, 29)])
def test_nested_starts_anew_at_a_reset(cuts):
    system, params, x = make_nested(), nested_params(), tokens(29)
    where = np.arange(29) == 16
    expected = np.concatenate([tick_nested(params, x[:16])[0], tick_nested(params, x[16:])[0]])
    y, end = levels.run(system, params, system.init(params), x, reset=where)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    z, carry = in_pieces(system, params, x, cuts, where)
    np.testing.assert_allclose(z, expected, atol=2e-5)
    assert_same(carry, end)
    assert int(carry.position) == 13


def test_nested_is_exactly_its_init_after_a_slow_step():
    """Oracle 47, bitwise."""
    system, params, x = make_nested(), nested_params(), tokens(16)
    for cuts in ([], [3, 15]):
        _, carry = in_pieces(system, params, x, cuts)
        fast, slow = carry.state
        spread = params["slow"]["spread"] * jnp.outer(jnp.tanh(slow.state), jnp.ones(SIZE))
        np.testing.assert_array_equal(fast.state, spread)


@pytest.mark.parametrize("cuts", SPLITS)
def test_compositions_compose(x64, cuts):
    """A nested pair beside a chain inside a chain, streamed, reset and differentiated."""
    rng = np.random.default_rng(0)
    kinds = [("one", "gradient"), ("two", "running"), ("last", "gradient")]
    params = {name: make_params(rng, kind, SIZE, np.float64) for name, kind in kinds}
    inner = levels.chain(running_level("two", 4), gradient_level("one", 2), name="inner")
    both = levels.parallel(inner, make_nested(), name="both")
    system = levels.chain(gradient_level("last", 16), both)
    params = {
        "both": {
            "inner": {k: params[k] for k in ("one", "two")},
            "nested": nested_params(np.float64),
        },
        "last": params["last"],
    }
    x = tokens(29, dtype=np.float64)
    specification = [("gradient", 2), ("running", 4)]
    inner_y, _ = tick_chain(specification, list(params["both"]["inner"].values()), x)
    nested_y = tick_nested(params["both"]["nested"], x)[0]
    expected, _ = tick_chain([("gradient", 16)], [params["last"]], inner_y + nested_y)
    y, end = levels.run(system, params, system.init(params), x)
    np.testing.assert_allclose(y, expected, atol=1e-10)
    z, carry = in_pieces(system, params, x, cuts)
    np.testing.assert_allclose(z, expected, atol=1e-10)
    assert_same(carry, end, atol=1e-10)
    fresh = levels.start(system, params, x)
    assert_same(levels.reset(system, params, carry, np.array(True)), fresh, atol=0)


@pytest.mark.parametrize("cuts", [[], [3, 17]])
def test_gradients_through_nested_equal_finite_differences(x64, cuts):
    system, params, x = make_nested(), nested_params(np.float64), tokens(29, dtype=np.float64)

    @jax.jit
    def loss(params):
        if not cuts:
            return jnp.sum(levels.run(system, params, system.init(params), x)[0] ** 2)
        carry, total = levels.start(system, params, x), 0.0
        for piece in np.split(x, cuts):
            y, carry = levels.run(system, params, carry, piece)
            total = total + jnp.sum(y**2)
        return total

    gradient = jax.grad(loss)(params)
    for level, name in [("fast", "rate"), ("slow", "start"), ("slow", "spread"), ("slow", "rate")]:
        leaf = params[level][name]
        direction = np.random.default_rng(2).standard_normal(leaf.shape)
        move = lambda s: params | {level: params[level] | {name: leaf + s * direction}}  # noqa: B023, E731
        numeric = (loss(move(1e-5)) - loss(move(-1e-5))) / 2e-5
        np.testing.assert_allclose(np.sum(gradient[level][name] * direction), numeric, rtol=1e-6)


def test_nested_in_a_nested():
    """Three levels deep: the middle restarts the fast one, the slow one restarts both."""

    def count(name, period):
        return levels.read_write(
            name,
            period,
            init=lambda params: jnp.zeros(()),
            read=lambda params, state, x: x,
            write=lambda params, state, x: state + 1,
        )

    inner = levels.nested(count("a", 1), count("b", 4), lambda p, b: 10 * b, name="inner")
    system = levels.nested(inner, count("c", 12), lambda p, c: (100 * c, 1000 * c))
    params = {"inner": {"a": None, "b": None}, "c": None}
    x = np.zeros(23, np.float32)
    for cuts in ([], [7, 8, 13]):
        _, carry = in_pieces(system, params, x, cuts)
        (a, b), c = carry.state[0].state, carry.state[1]
        # c wrote at 12, b at 16 and 20 from 1000, a three times from 10 b
        assert (float(a.state), float(b.state), float(c.state)) == (10023.0, 1002.0, 1.0)


def test_mistakes_are_named():
    a, b, c = gradient_level("a", 4), gradient_level("b", 6), gradient_level("c", 12)
    frozen = levels.read_write("f", None, init=a.init, read=lambda p, s, x: x)
    with pytest.raises(
        ValueError, match="period 4 of level 'a' does not divide the period 6 of level 'b'.*4 or 8"
    ):
        levels.chain(c, b, a)
    assert levels.parallel(a, b, c).period == 12
    with pytest.raises(ValueError, match="'a' does not divide"):
        levels.flow(b, a)
    with pytest.raises(ValueError, match="different names"):
        levels.chain(a, gradient_level("a", 8))
    with pytest.raises(ValueError, match="'f' is frozen"):
        levels.nested(a, frozen, lambda p, s: s)
    with pytest.raises(ValueError, match="swap them"):
        levels.nested(c, a, lambda p, s: s)
    chain = levels.chain(a, c)
    with pytest.raises(ValueError, match="no entry 'a'.*'x'"):
        chain.init({"x": None})
    with pytest.raises(ValueError, match="dict by level name or a tuple"):
        chain.init(np.zeros(2))
