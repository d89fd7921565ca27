"""`adapt` and `adaptive_level`: inner gradient steps inside one sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestedjax import levels

VOCAB, WIDTH, PERIOD = 5, 4, 3


def make_model(rng, dtype=np.float32):
    """A recurrent next-token model whose output matrix learns in context."""
    normal = lambda *shape: (0.5 * rng.standard_normal(shape)).astype(dtype)  # noqa: E731
    return {
        "embed": normal(VOCAB, WIDTH),
        "mix": normal(WIDTH, WIDTH),
        "fast": normal(VOCAB, WIDTH),
        "rate": np.asarray(0.3, dtype),
    }


def forward(params, fast, carry, tokens):
    def tick(hidden, token):
        hidden = jnp.tanh(params["mix"] @ hidden + jnp.asarray(params["embed"])[token])
        return hidden, hidden

    carry, hidden = jax.lax.scan(tick, carry, tokens)
    return hidden @ fast.T, carry


def token_loss(params, logits, labels):
    del params
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@pytest.fixture
def lax_promotion():
    """Adam's bias correction in optax raises a float to an int power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def make_level(tx=None, **options):
    return levels.adaptive_level(
        "model",
        PERIOD,
        forward=forward,
        loss=token_loss,
        tx=(lambda params: optax.sgd(params["rate"])) if tx is None else tx,
        init_fast=lambda params: jnp.asarray(params["fast"]),
        init_carry=lambda params: jnp.zeros(WIDTH, params["embed"].dtype),
        **options,
    )


def oracle(params, tokens):
    """Token by token with SGD written by hand: probabilities minus one-hot, no autodiff."""
    fast, hidden = np.array(params["fast"]), np.zeros(WIDTH)
    past, outputs = [], []  # past: (hidden, logits) of the unfinished or just finished chunk
    for i, token in enumerate(tokens):
        if i and i % PERIOD == 0:
            gradient = np.zeros_like(fast)
            for (state, logits), label in zip(past, tokens[i - PERIOD + 1 : i + 1], strict=True):
                error = np.exp(logits) / np.exp(logits).sum() - np.eye(VOCAB)[label]
                gradient += np.outer(error, state) / PERIOD
            fast, past = fast - params["rate"] * gradient, []
        hidden = np.tanh(params["mix"] @ hidden + params["embed"][token])
        outputs.append(fast @ hidden)
        past.append((hidden, outputs[-1]))
    return np.stack(outputs)


def make_tokens(length, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


@pytest.mark.parametrize("length", [1, 3, 4, 6, 14])
def test_adaptive_level_equals_ticks(length):
    params = make_model(np.random.default_rng(0))
    level, tokens = make_level(), make_tokens(length)
    y, carry = levels.run(level, params, level.init(params), tokens)
    np.testing.assert_allclose(y, oracle(params, tokens), atol=1e-5)
    assert int(carry.position) == length


@pytest.mark.parametrize("tx,cuts", [("sgd", range(1, 14)), ("sgd", [3, 9]), ("adam", [7, 8, 12])])
def test_adaptive_level_equals_any_split(lax_promotion, tx, cuts):
    params = make_model(np.random.default_rng(0))
    level, tokens = make_level(None if tx == "sgd" else optax.adam(0.1)), make_tokens(14)
    y, end = levels.run(level, params, level.init(params), tokens)
    carry, outputs = level.init(params), []
    run = jax.jit(lambda carry, x: levels.run(level, params, carry, x))
    for piece in np.split(tokens, cuts):
        out, carry = run(carry, piece)
        outputs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outputs), y, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), carry, end)
    kind = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert kind(carry) == kind(end)


@pytest.mark.parametrize("cuts", [[4], range(1, 14)])
def test_adaptive_level_inside_a_composition(cuts):
    """As the slow level of a pair, and beside another level of another period."""
    params, tokens = make_model(np.random.default_rng(0)), make_tokens(14)
    same = levels.read_write("same", None, init=lambda p: (), read=lambda p, s, x: x)
    pair = levels.nested(same, make_level(), lambda params, state: ())
    longer = make_level()._replace(name="other")
    system = levels.parallel(pair, longer)
    params = {"nested": {"same": None, "model": params}, "other": params}
    carry, outputs = levels.start(system, params, tokens), []
    run = jax.jit(lambda carry, x: levels.run(system, params, carry, x))
    for piece in np.split(tokens, cuts):
        y, carry = run(carry, piece)
        outputs.append(y)
    expected = 2 * oracle(params["other"], tokens)
    np.testing.assert_allclose(np.concatenate(outputs), expected, atol=2e-5)


def test_adaptive_level_starts_anew_at_a_reset():
    params = make_model(np.random.default_rng(0))
    level, tokens = make_level(), make_tokens(17)
    y, carry = levels.run(level, params, level.init(params), tokens, reset=np.arange(17) == 6)
    expected = np.concatenate([oracle(params, tokens[:6]), oracle(params, tokens[6:])])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert int(carry.position) == 11
    start = levels.start(level, params, tokens)
    z, _ = levels.run(level, params, start, tokens, reset=np.arange(17) == 6)
    np.testing.assert_allclose(z, expected, atol=1e-5)


def test_adaptive_level_is_causal_exactly():
    params, level = make_model(np.random.default_rng(0)), make_level()
    run = jax.jit(lambda x: levels.run(level, params, level.init(params), x)[0])
    tokens = make_tokens(14)
    for at in [2, 3, 8]:
        other = tokens.copy()
        other[at] = (other[at] + 1) % VOCAB
        y, z = np.asarray(run(tokens)), np.asarray(run(other))
        np.testing.assert_array_equal(y[:at], z[:at])
        assert not np.array_equal(y[at], z[at])


def sequence_loss(level, params, tokens, pieces=()):
    state, total = level.init(params), 0.0
    start = 0
    for piece in np.split(tokens[:-1], pieces):
        y, state = levels.run(level, params, state, piece)
        labels = tokens[start + 1 : start + 1 + len(piece)]
        total, start = total + token_loss(params, y, labels).sum(), start + len(piece)
    return total


@pytest.mark.parametrize("pieces", [(), (2, 7)])
def test_second_order_gradient_equals_finite_differences(x64, pieces):
    rng = np.random.default_rng(0)
    params, tokens = make_model(rng, np.float64), make_tokens(15)
    level = make_level()
    loss = jax.jit(lambda params: sequence_loss(level, params, tokens, pieces))
    gradient = jax.grad(loss)(params)
    for name, leaf in params.items():
        direction = rng.standard_normal(leaf.shape)
        up, down = ({**params, name: leaf + s * direction} for s in (1e-5, -1e-5))
        numeric = (loss(up) - loss(down)) / 2e-5
        np.testing.assert_allclose(np.sum(gradient[name] * direction), numeric, rtol=1e-6)
        assert np.any(gradient[name])


@pytest.mark.parametrize("horizon,agree", [(PERIOD, True), (2 * PERIOD, False)])
def test_first_and_second_order_agree_within_one_chunk(x64, horizon, agree):
    """Oracle 52: no update is used yet."""
    params = make_model(np.random.default_rng(0), np.float64)
    tokens = make_tokens(horizon + 1)
    first, second = (
        jax.grad(lambda p, level: sequence_loss(level, p, tokens))(params, level)
        for level in (make_level(second_order=False), make_level())
    )
    assert np.allclose(first["fast"], second["fast"], rtol=1e-10) == agree


def test_an_adaptive_level_longer_than_the_text_adapts_nothing():
    """Oracle 45."""
    params, tokens = make_model(np.random.default_rng(0)), make_tokens(14)
    long = levels.adaptive_level(
        "model",
        20,
        forward=forward,
        loss=token_loss,
        tx=optax.sgd(1.0),
        init_fast=lambda params: jnp.asarray(params["fast"]),
        init_carry=lambda params: jnp.zeros(WIDTH),
    )
    y, _ = levels.run(long, params, long.init(params), tokens)
    z, _ = forward(params, params["fast"], jnp.zeros(WIDTH), tokens)
    np.testing.assert_allclose(y, z, atol=1e-6)


def test_adapt_equals_the_level():
    """The labels of a chunk in hand, `adapt` is the level without its delay."""
    params, tokens = make_model(np.random.default_rng(0)), make_tokens(13)
    level = make_level()

    def loss(fast, carry, chunk):
        logits, carry = forward(params, fast, carry, chunk["tokens"])
        return token_loss(params, logits, chunk["labels"]).mean(), (carry, logits)

    out = levels.adapt(
        loss,
        optax.sgd(0.3),
        jnp.asarray(params["fast"]),
        {"tokens": tokens[:-1], "labels": tokens[1:]},
        period=PERIOD,
        carry=jnp.zeros(WIDTH),
    )
    y, end = levels.run(level, params, level.init(params), tokens)
    np.testing.assert_allclose(out.outputs, y[:-1], atol=1e-6)
    np.testing.assert_allclose(out.carry, end.state.carry, atol=1e-6)
    per_token = token_loss(params, out.outputs, tokens[1:]).reshape(-1, PERIOD).mean(1)
    np.testing.assert_allclose(out.losses, per_token, atol=1e-6)
    # The level writes chunk c when it sees the first token of chunk c + 1.
    again, _ = levels.run(level, params, end, tokens[:1])
    assert again.shape == (1, VOCAB)


def test_adapt_continues_from_what_it_returned(lax_promotion):
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 12, 3)).astype(np.float32)

    def loss(weights, carry, chunk):
        error = chunk["x"] @ weights - chunk["target"]
        return (error**2).mean(), (carry + 1, error)

    def run(start, stop, params, **more):
        chunk = {"x": x[start:stop], "target": target[start:stop]}
        return levels.adapt(loss, optax.adam(0.1), params, chunk, period=4, **more)

    weights = jnp.zeros((3, 3))
    whole = run(0, 12, weights, carry=jnp.zeros((), jnp.int32))
    first = run(0, 8, weights, carry=jnp.zeros((), jnp.int32))
    rest = run(8, 12, first.params, carry=first.carry, optimizer=first.optimizer)
    np.testing.assert_allclose(rest.params, whole.params, atol=1e-6)
    assert int(whole.carry) == 3
    tail = run(0, 9, weights, carry=jnp.zeros((), jnp.int32))
    np.testing.assert_allclose(tail.params, first.params, atol=1e-6)
    np.testing.assert_allclose(tail.outputs, whole.outputs[:9], atol=1e-6)
    assert tail.losses.shape == (3,)


def test_meta_learning_lowers_the_loss_after_adaptation(x64):
    """Oracle 54: on linear tasks y = (a + w) . x the best start is the mean of the tasks."""
    rng = np.random.default_rng(0)
    mean = np.array([1.0, -2.0, 0.5])
    x = rng.standard_normal((64, 9, 3))
    y = np.einsum("btd,bd->bt", x, mean + 0.3 * rng.standard_normal((64, 3)))

    def after(meta, x, y, second_order):
        def loss(weights, carry, chunk):
            error = chunk["x"] @ weights - chunk["y"]
            return (error**2).mean() / 2, (carry, error**2 / 2)

        out = levels.adapt(
            loss,
            optax.sgd(jnp.exp(meta["log_rate"])),
            meta["start"],
            {"x": x, "y": y},
            period=4,
            second_order=second_order,
        )
        return out.outputs[-1]

    for order in (True, False):
        objective = jax.jit(
            lambda meta, order=order: jnp.mean(
                jax.vmap(lambda x, y: after(meta, x, y, order))(x, y)
            )
        )
        meta = {"start": jnp.zeros(3), "log_rate": jnp.log(0.1)}
        before = objective(meta)
        gradient = jax.jit(jax.grad(objective))
        for _ in range(150):
            meta = jax.tree.map(lambda p, g: p - 0.2 * g, meta, gradient(meta))
        assert objective(meta) < 0.1 * before
        np.testing.assert_allclose(meta["start"], mean, atol=0.3)
        assert meta["log_rate"] > np.log(0.1)  # the tasks reward a faster inner step


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="mean.*sum.*'max'"):
        make_level(reduction="max")
    with pytest.raises(ValueError, match="period >= 1"):
        levels.adapt(lambda p, c, x: None, optax.sgd(0.1), jnp.zeros(3), jnp.zeros(4), period=0)
