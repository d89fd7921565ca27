"""The laws every system of levels keeps, against an oracle that ticks token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax import levels
from tests.levels.systems import MAKERS, frozen_level, make_params, tick_chain
from tests.vmaps import check_vmaps

SIZE = 3
SYSTEMS = {
    "one": [("gradient", 4)],
    "three": [("gradient", 2), ("running", 4), ("gradient", 8)],
    "equal": [("running", 3), ("gradient", 3)],
    "incremental": [("incremental", 4), ("gradient", 8), ("incremental", 8)],
    "four": [("running", 1), ("gradient", 2), ("gradient", 6), ("frozen", None)],
}


def build(specification, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    parts, params = [], {}
    for i, (kind, period) in enumerate(specification):
        name = f"{kind} {i}"
        parts.append(frozen_level(name) if kind == "frozen" else MAKERS[kind](name, period))
        params[name] = make_params(rng, kind, SIZE, dtype)
    return levels.chain(*parts), params


def tokens(length, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((length, SIZE)).astype(dtype)


def written(carry):
    """The states of the plain levels of a chain."""
    return [part.state for part in carry.state]


@pytest.fixture(params=SYSTEMS)
def specification(request):
    return SYSTEMS[request.param]


@pytest.mark.parametrize("length", [5, 24, 29])
def test_one_call_equals_the_ticks(specification, length):
    system, params = build(specification)
    x = tokens(length)
    y, carry = jax.jit(lambda x: levels.run(system, params, system.init(params), x))(x)
    expected, ticks = tick_chain(specification, list(params.values()), x)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    for state, tick in zip(written(carry), ticks, strict=True):
        np.testing.assert_allclose(state, tick.state, atol=2e-5)


@pytest.mark.parametrize("seed", range(2))
def test_one_call_equals_any_split(specification, seed):
    system, params = build(specification)
    x = tokens(30)
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, 30), size=5, replace=False))
    pieces = [*np.split(x, cuts), x[:0]] if seed else [x[i : i + 1] for i in range(30)]
    expected, ticks = tick_chain(specification, list(params.values()), x)
    run = jax.jit(lambda state, x: levels.run(system, params, state, x))
    carry = system.init(params) if seed == 1 else levels.start(system, params, x)
    outputs = []
    for piece in pieces:
        y, carry = run(carry, piece)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs), expected, atol=2e-5)
    for state, tick in zip(written(carry), ticks, strict=True):
        np.testing.assert_allclose(state, tick.state, atol=2e-5)
    assert int(carry.position) == 30


def test_listing_order_does_not_matter():
    system, params = build(SYSTEMS["three"])
    backwards = levels.chain(*system.parts[::-1])
    x = tokens(19)
    y, carry = levels.run(system, params, system.init(params), x)
    z, other = levels.run(backwards, params, backwards.init(params), x)
    jax.tree.map(np.testing.assert_array_equal, (y, carry), (z, other))
    listed = tuple(params[part.name] for part in system.parts[::-1])
    w, _ = levels.run(backwards, listed, backwards.init(listed), x)
    np.testing.assert_array_equal(y, w)


def test_writes_are_counted():
    """A state that counts its writes: floor(T / period), whatever the split (oracle 43)."""

    def counter(name, period):
        return levels.read_write(
            name,
            period,
            init=lambda params: jnp.zeros((), jnp.int32),
            read=lambda params, state, x: x,
            write=lambda params, state, x: state + 1,
        )

    system = levels.chain(counter("c", 12), counter("a", 2), counter("b", 6))
    params, x = (None, None, None), tokens(41)
    _, carry = levels.run(system, params, system.init(params), x)
    assert [int(state) for state in written(carry)] == [41 // 2, 41 // 6, 41 // 12]
    for _, carry in levels.stream(system, params, system.init(params), np.split(x, [1, 9, 28])):
        done = int(carry.position)
        assert [int(state) for state in written(carry)] == [done // 2, done // 6, done // 12]


def test_states_are_bitwise_constant_between_writes():
    system, params = build(SYSTEMS["three"])
    carry, before = levels.start(system, params, tokens(1)), None
    run = jax.jit(lambda carry, x: levels.run(system, params, carry, x))
    for i, x in enumerate(tokens(17)):
        _, carry = run(carry, x[None])
        if before is not None:
            for level, old, new in zip(system.parts, before, written(carry), strict=True):
                assert np.array_equal(old, new) == bool((i + 1) % level.period)
        before = written(carry)


@pytest.mark.parametrize("at", [5, 8])
def test_causal_exactly(specification, at):
    system, params = build(specification)
    run = jax.jit(lambda x: levels.run(system, params, system.init(params), x)[0])
    x = tokens(23)
    other = x.copy()
    other[at] += 1.0
    y, z = np.asarray(run(x)), np.asarray(run(other))
    np.testing.assert_array_equal(y[:at], z[:at])
    assert not np.array_equal(y[at], z[at])


def test_batch_isolated_exactly(specification):
    system, params = build(specification)
    run = jax.jit(jax.vmap(lambda state, x: levels.run(system, params, state, x), (None, 0)))
    more = jax.jit(jax.vmap(lambda state, x: levels.run(system, params, state, x)))
    x = np.stack([tokens(17, seed) for seed in range(3)])
    other = x.copy()
    other[1] *= 3.0
    y, carry = run(system.init(params), x[:, :9])
    z, changed = run(system.init(params), other[:, :9])
    y2, carry = more(carry, x[:, 9:])
    z2, changed = more(changed, other[:, 9:])
    for a, b in [(y, z), (y2, z2), *zip(*map(jax.tree.leaves, (carry, changed)), strict=True)]:
        np.testing.assert_array_equal(np.asarray(a)[[0, 2]], np.asarray(b)[[0, 2]])
    assert not np.array_equal(y2[1], z2[1])


def test_nested_vmaps_are_loops(specification):
    def both(given):
        params, x = given
        y, carry = levels.run(system, params, system.init(params), x)
        return y, carry.state

    system, _ = build(specification)
    check_vmaps(both, lambda i: (build(specification, i)[1], tokens(13, i)), rtol=1e-4, atol=1e-4)


def test_structure_and_dtypes_never_change(specification):
    system, params = build(specification)
    kind = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    run = partial(levels.run, system)
    carry = levels.start(system, params, tokens(1))
    expected = kind(carry)
    for length in [1, 7, 0, 24]:
        y, after = jax.eval_shape(run, params, carry, tokens(length))
        assert kind(after) == expected
        assert y.shape == (length, SIZE) and y.dtype == np.float32
        _, fresh = jax.eval_shape(run, params, system.init(params), tokens(length))
        assert kind(fresh) == expected


@pytest.mark.parametrize("cuts", [[], [5, 27]])
def test_a_reset_inside_a_packed_sequence_is_a_fresh_start(specification, cuts):
    system, params = build(specification)
    period = system.period
    begin = 24 if 24 % period == 0 else 20
    x = tokens(40)
    where = np.arange(40) == begin
    y = []
    carry = system.init(params)
    for piece, resets in zip(np.split(x, cuts), np.split(where, cuts), strict=True):
        out, carry = levels.run(system, params, carry, piece, reset=resets)
        y.append(out)
    first, _ = levels.run(system, params, system.init(params), x[:begin])
    second, alone = levels.run(system, params, system.init(params), x[begin:])
    np.testing.assert_allclose(np.concatenate(y), np.concatenate([first, second]), atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), carry, alone)


def test_reset_restarts_only_the_named_sequences(specification):
    system, params = build(specification)
    x = np.stack([tokens(11, seed) for seed in range(3)])
    fresh = jax.vmap(lambda x: levels.start(system, params, x))(x)
    run = jax.vmap(lambda carry, x: levels.run(system, params, carry, x))
    _, carry = run(fresh, x)
    where = np.array([True, False, True])
    again = levels.reset(system, params, carry, where)
    for new, old, first in zip(*map(jax.tree.leaves, (again, carry, fresh)), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        np.testing.assert_array_equal(np.asarray(new)[where], np.asarray(first)[where])
        assert new.dtype == old.dtype
    plain = jax.tree.map(lambda leaf: jnp.ones((3, *leaf.shape)), system.init(params))
    state = levels.reset(system, params, plain, where)
    for leaf, start in zip(*map(jax.tree.leaves, (state, system.init(params))), strict=True):
        np.testing.assert_array_equal(leaf[0], start)
        assert np.all(np.asarray(leaf[1]) == 1.0)


def directional(function, params, seed=3):
    """(derivative by autodiff, by central differences) of a scalar along a random direction."""
    rng = np.random.default_rng(seed)
    direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
    moved = lambda step: jax.tree.map(lambda p, d: p + step * d, params, direction)  # noqa: E731
    gradient = jax.grad(function)(params)
    dot = jax.tree.map(lambda g, d: float(np.sum(g * d)), gradient, direction)
    numeric = (function(moved(1e-5)) - function(moved(-1e-5))) / 2e-5
    return sum(jax.tree.leaves(dot)), float(numeric), gradient


@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_through_every_update_equal_finite_differences(x64, specification, streamed):
    system, params = build(specification, dtype=np.float64)
    x = tokens(21, dtype=np.float64)

    def loss(params):
        if not streamed:
            return jnp.sum(levels.run(system, params, system.init(params), x)[0] ** 2)
        carry, total = levels.start(system, params, x), 0.0
        for piece in np.split(x, [3, 15]):
            y, carry = levels.run(system, params, carry, piece)
            total = total + jnp.sum(y**2)
        return total

    exact, numeric, gradient = directional(jax.jit(loss), params)
    np.testing.assert_allclose(exact, numeric, rtol=1e-7)
    for part in system.parts:  # the initial state and the inner learning rate of each level learn
        if part.period is not None:
            assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient[part.name]))
