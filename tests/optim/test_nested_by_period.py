"""`nested_by_period` against a loop in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestedjax import levels, optim

LABELS = {"a": "fast", "b": "mid", "c": "slow", "d": ""}
PERIODS = {"fast": 1, "mid": 2, "slow": 6, "": None}
CHAIN = ("fast", "mid", "slow")
CALLS = 13


@pytest.fixture(autouse=True)
def lax_promotion():
    """Adam's bias correction in optax raises a float to an int power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def problem(dtype=np.float64):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal(3), dtype) for name in LABELS}
    stream = {name: jnp.asarray(rng.standard_normal((CALLS, 3)), dtype) for name in LABELS}
    return params, stream


def run(tx, params, stream):
    def body(held, g):
        params, state = held
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    _, history = jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), stream))()
    return history


def by_hand(params, stream, rule, rate, momentum):
    """SGD with momentum on every block and every start, one call at a time."""
    faster = dict(zip(CHAIN[1:], CHAIN, strict=False))
    leaf = {label: name for name, label in LABELS.items()}
    w = {label: np.array(params[leaf[label]]) for label in PERIODS}
    v, sums = ({label: np.zeros(3) for label in PERIODS} for _ in range(2))
    start = {slow: w[fast].copy() for slow, fast in faster.items()}
    start_v, start_sums = ({slow: np.zeros(3) for slow in faster} for _ in range(2))
    history = []
    for i in range(CALLS):
        for label, period in PERIODS.items():
            g = np.asarray(stream[leaf[label]][i])
            sums[label] = sums[label] + g
            for slow, fast in faster.items():
                if fast == label:
                    start_sums[slow] = start_sums[slow] + g
            if (i + 1) % (period or 1) == 0:
                v[label] = momentum * v[label] + sums[label] / (period or 1)
                w[label], sums[label] = w[label] - 0.1 * v[label], np.zeros(3)
        for slow, fast in faster.items():
            if (i + 1) % PERIODS[slow]:
                continue
            if rule == "fomaml":
                start_v[slow] = momentum * start_v[slow] + start_sums[slow] / PERIODS[slow]
                start[slow] = start[slow] - 0.1 * start_v[slow]
            if rule == "reptile":
                start[slow] = start[slow] + rate * (w[fast] - start[slow])
            start_sums[slow] = np.zeros(3)
            w[fast], v[fast], sums[fast] = start[slow].copy(), np.zeros(3), np.zeros(3)
        history.append({leaf[label]: value for label, value in w.items()})
    return {name: np.stack([h[name] for h in history]) for name in LABELS}


@pytest.mark.parametrize("rule", ["fomaml", "reptile", "frozen"])
def test_equals_the_loop(x64, rule):
    params, stream = problem()
    groups = {label: (p, optax.sgd(0.1, momentum=0.9)) for label, p in PERIODS.items()}
    tx = optim.nested_by_period(groups, LABELS, chain=CHAIN, rule=rule, reptile_learning_rate=0.3)
    found, _ = run(tx, params, stream)
    expected = by_hand(params, stream, rule, 0.3, 0.9)
    for name in LABELS:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12)


@pytest.mark.parametrize("rule", ["fomaml", "reptile", "frozen"])
def test_after_a_slow_step_the_fast_block_is_its_start_bit_for_bit(rule):
    """Oracle 47, with optimizers whose arithmetic could be contracted."""
    params, stream = problem(np.float32)
    groups = {label: (p, optax.adamw(0.1)) for label, p in PERIODS.items()}
    tx = optim.nested_by_period(groups, LABELS, chain=CHAIN, rule=rule)
    found, state = run(tx, params, stream)
    for slow, name, own, period in (("mid", "a", 1, 2), ("slow", "b", 2, 6)):
        start = np.asarray(state.starts[slow].start[name])
        for i in range(CALLS):
            equal = start[i].tobytes() == np.asarray(found[name][i]).tobytes()
            assert equal == ((i + 1) % period < own), (slow, i)  # until it steps by itself
        still = np.allclose(start, start[0], atol=1e-6)
        assert still == (rule == "frozen")
    fast = state.blocks.inner_states["fast"].inner_state
    assert not np.asarray(fast.inner[0].mu["a"])[1::2].any()
    assert list(fast.inner[0].count) == [i % 2 for i in range(1, CALLS + 1)]


def test_a_schedule_goes_on_through_restarts():
    params, _ = problem(np.float32)
    rates = lambda count: jnp.asarray(1.0) * (count + 1)  # noqa: E731
    groups = {label: (p, optax.sgd(rates)) for label, p in PERIODS.items()}
    tx = optim.nested_by_period(groups, LABELS, chain=CHAIN, rule="frozen")
    ones = {name: jnp.ones((CALLS, 3)) for name in LABELS}
    found, _ = run(tx, params, ones)
    moved = np.asarray(found["a"])[::2, 0] - float(params["a"][0])  # one call after each restart
    np.testing.assert_allclose(moved, -np.arange(1.0, CALLS + 1, 2), rtol=1e-5)


def test_one_block_is_by_period():
    params, stream = problem(np.float32)
    groups = {label: (p, optax.adam(0.1)) for label, p in PERIODS.items()}
    nested, _ = run(optim.nested_by_period(groups, LABELS, chain=("slow",)), params, stream)
    plain, _ = run(optim.by_period(groups, LABELS), params, stream)
    for name in LABELS:
        np.testing.assert_allclose(nested[name], plain[name], atol=1e-6)


def test_describe_shows_the_starts():
    params, _ = problem(np.float32)
    groups = {label: (p, optax.sgd(0.1)) for label, p in PERIODS.items()}
    tx = optim.nested_by_period(groups, LABELS, chain=CHAIN)
    tokens = optim.in_tokens(PERIODS, step_tokens=64)
    state = jax.eval_shape(tx.init, params)
    found = {
        box.name: box
        for box in levels.describe((), optim.boxes_of(state), params=params, step_tokens=tokens)
    }
    assert found["slow start of the faster block"].period == 6 * 64
    assert found["mid start of the faster block"].parameters == 3
    assert found["slow start of the faster block"].transfer == "init"


def test_mistakes_are_named(unchecked):
    sgd = optax.sgd(0.1)
    groups = {"a": (2, sgd), "b": (3, sgd), "": (None, sgd)}
    with pytest.raises(ValueError, match="2 of 'a' does not divide.* 3 of 'b'"):
        optim.nested_by_period(groups, {}, chain=("a", "b"))
    with pytest.raises(ValueError, match="'' needs a period"):
        optim.nested_by_period(groups, {}, chain=("a", ""))
    with pytest.raises(ValueError, match="'maml' is not one of"):
        optim.nested_by_period(groups, {}, chain=("a",), rule="maml")
    tx = optim.nested_by_period(groups, {"x": "a"}, chain=("a",))
    params = {"x": jnp.zeros(2)}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


def test_schedules_go_on_where_a_block_begins_again():
    """Of a learning rate, of weight decay, of injected numbers and inside of dgd and ggd."""
    ramp = lambda count: 1.0 * count  # noqa: E731
    rules = {
        "scale_by_schedule": optax.sgd(ramp),
        "weight decay": optax.chain(optax.add_decayed_weights(ramp), optax.scale(-1.0)),
        "injected": optax.inject_hyperparams(optax.sgd)(ramp),
        "injected into ggd": optax.inject_hyperparams(optim.ggd, static_args="inner_steps")(ramp),
        "ggd": optim.ggd(ramp),
    }
    labels, calls = {"a": "fast", "b": "slow"}, 7
    params = {"a": jnp.ones(()), "b": jnp.ones(())}
    for name, rule in rules.items():
        groups = {"fast": (1, rule), "slow": (3, optax.sgd(0.0))}
        tx = optim.nested_by_period(groups, labels, chain=("fast", "slow"), rule="frozen")
        gradient = {"a": jnp.asarray(name != "weight decay", jnp.float32), "b": jnp.zeros(())}

        def body(state, _, tx=tx, gradient=gradient):
            updates, state = tx.update(gradient, state, params)
            return state, updates["a"]

        _, moved = jax.jit(
            lambda tx=tx, body=body: jax.lax.scan(body, tx.init(params), None, calls)
        )()
        steps = np.arange(calls)
        expected = np.where((steps + 1) % 3 == 0, 0.0, -1.0 * steps)  # the jump is to where it is
        np.testing.assert_allclose(moved, expected, err_msg=name)


def test_a_fresh_state_shares_no_buffer_with_the_parameters():
    groups = {"fast": (1, optax.sgd(0.1)), "slow": (3, optax.sgd(0.1))}
    tx = optim.nested_by_period(groups, {"a": "fast", "b": "slow"}, chain=("fast", "slow"))
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
