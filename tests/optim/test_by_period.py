"""`by_period` and `accumulate` against loops in numpy and against `optax.MultiSteps`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestedjax import levels, optim
from nestedjax.checkpoint import Checkpoints

LABELS = {"a": "fast", "b": "slow", "c": ""}
LABELS_2 = {"a": "fast", "b": "slow"}


@pytest.fixture(autouse=True)
def lax_promotion():
    """Adam's bias correction in optax raises a float to an int power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def weights(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal((3, 2)), dtype) for name in LABELS}


def gradients(calls, dtype=np.float32):
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.standard_normal((calls, 3, 2)), dtype) for name in LABELS}


def run(tx, params, stream):
    """Parameters and states after every call, as one scan."""

    def body(held, g):
        params, state = held
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, updates)

    _, history = jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), stream))()
    return history


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("period", [1, 2, 3])
def test_one_label_is_optax_multisteps(period):
    inner = optax.adamw(0.1)
    ours = optim.by_period({"all": (period, inner)}, lambda params: dict.fromkeys(params, "all"))
    params, _, _ = run(ours, weights(), gradients(7))
    theirs, _, _ = run(optax.MultiSteps(inner, period), weights(), gradients(7))
    same(params, theirs, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_each_label_is_stepped_at_its_own_period(x64, reduction):
    """Momentum by hand: v = 0.9 v + g; w = w - 0.1 v once a period, nothing in between."""
    periods = {"fast": 2, "slow": 6, "": None}
    groups = {label: (p, optax.sgd(0.1, momentum=0.9)) for label, p in periods.items()}
    tx = optim.by_period(groups, LABELS, reduction=reduction)
    stream = gradients(14, np.float64)
    params, state, updates = run(tx, weights(np.float64), stream)
    for name, label in LABELS.items():
        period = periods[label] or 1
        w, v = np.array(weights(np.float64)[name]), np.zeros((3, 2))
        written = []
        for i in range(14):
            if (i + 1) % period == 0:
                block = np.asarray(stream[name][i + 1 - period : i + 1])
                v = 0.9 * v + (block.mean(0) if reduction == "mean" else block.sum(0))
                w = w - 0.1 * v
                written.append(i)
            np.testing.assert_allclose(params[name][i], w, atol=1e-12)
        moved = np.flatnonzero(np.any(np.asarray(updates[name]) != 0, axis=(1, 2)))
        assert list(moved) == written and len(written) == 14 // period  # oracle 43


def test_bitwise_constant_between_writes():
    tx = optim.by_period({"fast": (2, optax.adam(0.1)), "slow": (5, optax.adam(0.1))}, LABELS_2)
    start = {name: weights()[name] for name in LABELS_2}
    stream = {name: gradients(12)[name] for name in LABELS_2}
    params, state, _ = run(tx, start, stream)
    for name, label in LABELS_2.items():
        period = {"fast": 2, "slow": 5}[label]
        held = state.inner_states[label].inner_state
        for leaf in jax.tree.leaves((params[name], held.inner)):
            leaf = np.asarray(leaf)
            changed = [i for i in range(1, 12) if leaf[i].tobytes() != leaf[i - 1].tobytes()]
            assert changed == [i for i in range(1, 12) if (i + 1) % period == 0]
        assert list(held.count) == list(range(1, 13))
        sums = np.asarray(held.acc_grads[name])
        assert not sums[period - 1].any() and sums[period - 2 if period > 2 else 0].any()


def test_all_periods_one_is_the_plain_optimizer():
    """Oracle 44, first half."""
    adam = optax.adam(0.1)
    ours = optim.by_period({"fast": (1, adam), "slow": (None, adam), "": (1, adam)}, LABELS)
    params, _, _ = run(ours, weights(), gradients(5))
    plain, _, _ = run(adam, weights(), gradients(5))
    same(params, plain, atol=1e-6)


def test_mean_of_a_period_is_the_gradient_of_a_larger_batch(x64):
    """Oracle 44, second half: linear regression, 3 batches of 4 against one of 12."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((12, 3)), rng.standard_normal(12)
    loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)  # noqa: E731
    tx, w = optim.accumulate(optax.sgd(0.1), 3), jnp.zeros(3)
    state = tx.init(w)
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        updates, state = tx.update(jax.grad(loss)(w, x[rows], y[rows]), state, w)
        w = w + updates
    np.testing.assert_allclose(w, 0.2 * x.T @ y / 12, atol=1e-12)


def test_inside_adapt_labels_have_their_own_periods():
    """Scanned over the chunks of one sequence, per sequence under vmap, and differentiable."""
    tx = optim.by_period({"fast": (1, optax.sgd(0.5)), "slow": (2, optax.sgd(0.5))}, LABELS_2)

    def loss(w, carry, chunk):
        return ((w["a"] + w["b"] - chunk) ** 2).mean() / 2, (carry, w)

    def adapted(start, x):
        def outputs(w, carry, chunk):
            value, (carry, w) = loss(w, carry, chunk)
            return value, (carry, jax.tree.map(lambda v: jnp.full(chunk.shape, v), w))

        return levels.adapt(outputs, tx, start, x, period=3).outputs

    x = np.random.default_rng(3).standard_normal((2, 15)).astype(np.float32)
    start = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    found = jax.jit(jax.vmap(adapted, (None, 0)))(start, x)
    for row in range(2):
        a = b = total = 0.0
        for chunk in range(5):
            np.testing.assert_allclose(found["a"][row, 3 * chunk], a, atol=1e-5)
            np.testing.assert_allclose(found["b"][row, 3 * chunk], b, atol=1e-5)
            g = a + b - x[row, 3 * chunk : 3 * chunk + 3].mean()
            a, total = a - 0.5 * g, total + g
            if chunk % 2:
                b, total = b - 0.5 * total / 2, 0.0
    slope = jax.grad(lambda w: adapted(w, x[0])["a"][-1])(start)
    assert float(slope["b"]) != 0 and float(slope["a"]) != float(slope["b"])


def test_describe_shows_each_label_with_its_period():
    adam = optax.adam(0.1)
    tx = optim.by_period({"fast": (2, adam), "slow": (4, adam), "": (None, adam)}, LABELS)
    tokens = optim.in_tokens({"fast": 2, "slow": 4}, step_tokens=64)
    state = jax.eval_shape(tx.init, weights())
    boxes = levels.describe((), optim.boxes_of(state), params=weights(), step_tokens=tokens)
    assert {box.name: box.period for box in boxes} == {
        "parameters": 64,
        "first moment": 64,
        "second moment": 64,
        "fast first moment": 128,
        "fast second moment": 128,
        "fast gradient accumulator": 64,
        "slow first moment": 256,
        "slow second moment": 256,
        "slow gradient accumulator": 64,
    }
    assert {box.parameters for box in boxes if "slow" in box.name} == {6}


def test_a_checkpoint_in_mid_period_continues(tmp_path):
    adam = optax.adam(0.1)
    tx = optim.by_period({"fast": (2, adam), "slow": (3, adam), "": (None, adam)}, LABELS)
    start, stream, update = weights(), gradients(6), jax.jit(tx.update)

    def go(params, state, calls):
        for i in calls:
            updates, state = update(jax.tree.map(lambda g, i=i: g[i], stream), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    whole = go(start, tx.init(start), range(6))
    half = go(start, tx.init(start), range(4))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, half, meta={})
        checkpoints.wait()
        restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, half))
    same(go(*restored.state, range(4, 6)), whole, rtol=0, atol=0)


def test_half_precision_gradients_accumulate_in_float32():
    tx = optim.accumulate(optax.sgd(1.0), 256)
    params = jnp.zeros((), jnp.bfloat16)
    state = tx.init(params)
    assert state.acc_grads.dtype == jnp.float32
    tiny = jnp.asarray(1 / 512, jnp.bfloat16)

    def body(state, _):
        updates, state = tx.update(tiny, state, params)
        return state, updates

    state, updates = jax.jit(lambda s: jax.lax.scan(body, s, None, length=256))(state)
    assert updates.dtype == jnp.bfloat16 and float(updates[-1]) == -1 / 512


def test_explicit_sharding():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    tx = optim.by_period({"all": (2, optax.adam(0.1))}, {"w": "all"})
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        params = {"w": jax.device_put(jnp.ones((8, 2)), place)}
        state = jax.jit(tx.init)(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(params, state, params)
    np.testing.assert_allclose(updates["w"], -0.1, atol=1e-5)


def test_optax_finds_the_parameters_in_the_state():
    """What places an optimizer state on a mesh."""
    tx = optim.by_period({"all": (2, optax.adam(0.1))}, lambda params: {"w": "all"})
    state = tx.init({"w": jnp.ones(3)})
    marked = optax.tree.map_params(tx, lambda leaf: "param", state)
    held = marked.inner_states["all"].inner_state
    assert held.acc_grads["w"] == "param" and held.inner[0].mu["w"] == "param"
    assert held.count == 0


def test_tokens_to_steps():
    assert optim.in_steps({"": None, "a": 64, "b": 192}, step_tokens=64) == {
        "": None,
        "a": 1,
        "b": 3,
    }
    with pytest.raises(ValueError, match="'cms.1' is 3000 tokens.*2048.*use 2048 or 4096"):
        optim.in_steps({"cms.1": 3000}, step_tokens=2048)
    with pytest.raises(ValueError, match="use 2048, or"):
        optim.in_steps({"cms.1": 16}, step_tokens=2048)
    with pytest.raises(ValueError, match="step_tokens=0"):
        optim.in_steps({}, step_tokens=0)


def test_mistakes_are_named(unchecked):
    with pytest.raises(ValueError, match="period=0"):
        optim.accumulate(optax.sgd(0.1), 0)
    with pytest.raises(ValueError, match="'max' is not one of mean, sum"):
        optim.accumulate(optax.sgd(0.1), 2, reduction="max")
    with pytest.raises(ValueError, match=r"\['slow'\] have no group.*'fast'"):
        optim.by_period({"fast": (1, optax.sgd(0.1))}, LABELS_2)
