"""The continuum memory against numpy, and learning in context against a loop with plain optax."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nestedjax import models
from nestedjax.layers import ContinuumMemory
from tests.models.families import (
    FAMILIES,
    PERIOD,
    STREAM,
    attention,
    built,
    in_context,
    token_losses,
    tokens_of,
)

WIDTH, HIDDEN, LENGTH = 6, 5, 14


@pytest.fixture(autouse=True)
def lax_promotion():
    """Adam's bias correction in optax raises a float to an int power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# The forward pass.


def memory(**changes):
    config = models.CMSConfig(**{"periods": (None, None, None), "hidden": HIDDEN, **changes})
    cms = ContinuumMemory(models.ModelConfig(1, WIDTH, 1), config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graphdef, weights = nnx.split(cms)
    weights = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype), weights
    )
    return nnx.merge(graphdef, weights)


def network(level, x):
    """The MLP in numpy."""
    up = x @ np.asarray(level.wi.kernel[...])
    if level.wg is None:
        h = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    else:
        gate = x @ np.asarray(level.wg.kernel[...])
        h = gate / (1 + np.exp(-gate)) * up
    return h @ np.asarray(level.wo.kernel[...])


def normed(norm, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_forward(mlp):
    x = np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)
    cms = memory(mlp=mlp)
    z = x
    for norm, level in zip(cms.norms, cms.levels, strict=True):
        z = z + network(level, normed(norm, z))
    np.testing.assert_allclose(cms(jnp.asarray(x))[0], z, atol=1e-4)
    cms = memory(mlp=mlp, form="headwise")
    share = np.exp(cms.weights[...]) / np.exp(cms.weights[...]).sum()
    h = normed(cms.norms[0], x)
    z = x + sum(a * network(level, h) for a, level in zip(share, cms.levels, strict=True))
    np.testing.assert_allclose(cms(jnp.asarray(x))[0], z, atol=1e-4)


def test_one_frozen_block_is_a_feed_forward_network():
    """Oracles 41 and 46: in both forms; a one-hot share picks its block."""
    x = np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)
    for form in ("sequential", "headwise"):
        cms = memory(periods=(None,), form=form)
        expected = x + network(cms.levels[0], normed(cms.norms[0], x))
        np.testing.assert_allclose(cms(jnp.asarray(x))[0], expected, atol=1e-5)
    cms = memory(form="headwise")
    for index in range(3):
        cms.weights[...] = jnp.where(jnp.arange(3) == index, 200.0, 0.0)
        expected = x + network(cms.levels[index], normed(cms.norms[0], x))
        np.testing.assert_allclose(cms(jnp.asarray(x))[0], expected, atol=1e-5)


# Learning in context.

CASES = {
    "sequential": attention(in_context(optimizer="momentum", reduction="sum", learning_rate=0.3)),
    "headwise": attention(in_context(form="headwise", optimizer="adamw", learning_rate=0.05)),
}


@functools.cache
def jitted(config):
    """A call on tokens [1, T] with explicit weights, the weights and the model."""
    graphdef, weights = built(config)

    @jax.jit
    def call(weights, tokens, state=None):
        return nnx.merge(graphdef, weights)(tokens, state)

    return call, weights, nnx.merge(graphdef, weights)


def block(path):
    """The index of the continuum block a weight belongs to."""
    name = jax.tree_util.keystr(path)
    at = name.find("['levels'][")
    return int(name[at + 11]) if at >= 0 else None


def by_hand(config, model, tokens):
    """Chunk by chunk: gradient of the whole model, optimizers from optax, sums kept in a list."""
    cms, inner = config.cms, config.cms.inner
    graphdef, weights = nnx.split(model.base)
    rates = np.asarray(model.rates[...])
    rule = {
        "sgd": optax.identity(),
        "momentum": optax.trace(0.9),
        "adamw": optax.scale_by_adam(b1=0.9, b2=0.95),
    }[inner.optimizer]
    rule = optax.chain(optax.clip_by_global_norm(inner.clip), rule)
    paths, structure = jax.tree_util.tree_flatten_with_path(weights)
    leaves = [leaf for _, leaf in paths]
    groups = {i: [n for n, (p, _) in enumerate(paths) if block(p) == i] for i in range(2)}
    states = {i: rule.init([leaves[n] for n in of]) for i, of in groups.items()}
    sums = {i: [0.0 for _ in of] for i, of in groups.items()}
    reduce = jnp.mean if inner.reduction == "mean" else jnp.sum

    @jax.jit
    def chunk_gradient(leaves, state, chunk, labels):
        def loss(leaves):
            logits, after = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))(chunk, state)
            shifted = jnp.concatenate([chunk, labels[:, -1:]], axis=1)
            losses = token_losses(jnp.pad(logits, ((0, 0), (0, 1), (0, 0))), shifted)
            return reduce(losses), (logits, after)

        return jax.grad(loss, has_aux=True)(leaves)

    state, outputs = model.base.init_state(1), []
    padded = jnp.pad(tokens, ((0, 0), (0, PERIOD)))
    for c in range(-(-tokens.shape[1] // PERIOD)):
        at = c * PERIOD
        chunk, labels = padded[:, at : at + PERIOD], padded[:, at + 1 : at + 1 + PERIOD]
        gradient, (logits, state) = chunk_gradient(leaves, state, chunk, labels)
        outputs.append(logits)
        for i, of in groups.items():
            sums[i] = [total + gradient[n] for total, n in zip(sums[i], of, strict=True)]
            chunks = cms.periods[i] // PERIOD
            if (c + 1) % chunks:
                continue
            mean = [t / (chunks if inner.reduction == "mean" else 1) for t in sums[i]]
            step, states[i] = rule.update(mean, states[i])
            rate = inner.learning_rate * np.exp(rates[i])[:, None, None]
            for n, u in zip(of, step, strict=True):
                leaves[n] = leaves[n] - rate * u
            sums[i] = [0.0 for _ in of]
    return jnp.concatenate(outputs, axis=1)[:, : tokens.shape[1]]


@pytest.mark.parametrize("name", CASES)
def test_learning_in_context_equals_the_loop(name):
    call, weights, model = jitted(CASES[name])
    tokens = tokens_of(LENGTH, batch=1)
    found, _ = call(weights, tokens)
    np.testing.assert_allclose(found, by_hand(CASES[name], model, tokens), atol=2e-4)
    still = jax.jit(model.base)(tokens)[0]
    assert float(jnp.max(jnp.abs(found - still)[:, PERIOD:])) > 1e-2
    np.testing.assert_allclose(found[:, :PERIOD], still[:, :PERIOD], atol=1e-4)  # oracle 45


@pytest.mark.parametrize("name", ["sequential", "headwise", "hope"])
def test_a_rate_of_zero_changes_nothing(name):
    """Oracle 42."""
    call, weights, model = jitted({**CASES, "hope": FAMILIES["hope_in_context"]}[name])
    tokens = tokens_of(3 * PERIOD if name == "hope" else LENGTH, batch=1)
    learned, still = call(weights, tokens)[0], jax.jit(model.base)(tokens)[0]
    assert float(jnp.max(jnp.abs(learned - still)[:, PERIOD:])) > 1e-2
    weights = jax.tree.map(lambda leaf: leaf, weights)
    weights["rates"] = weights["rates"].replace(jnp.full_like(model.rates[...], -1e9))
    np.testing.assert_allclose(call(weights, tokens)[0], still, atol=1e-4)


def test_adapting_a_trained_model():
    """Same weights, other lifetime."""
    config = attention(STREAM)
    graphdef, weights = built(config)
    model, tokens = nnx.merge(graphdef, weights), tokens_of(12, batch=1)
    still = jax.jit(model)(tokens)[0]
    inner = models.InnerConfig(learning_rate=1.0)
    learner = models.adapting(model, periods=(2, None), inner=inner)
    assert learner.config.cms.inner == inner and learner.base is model
    moved = jax.jit(learner)(tokens)[0] - still
    assert float(jnp.max(jnp.abs(moved[:, 2:]))) > 1e-2
    assert models.adapting(learner, inner=models.InnerConfig()).base is model
    with pytest.raises(ValueError, match="TransformerConfig has no continuum memory"):
        models.adapting(models.build("transformer_nano", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the model has 2 blocks"):
        models.adapting(model, periods=(4,))
    with pytest.raises(ValueError, match="write nothing in context"):
        models.adapting(model, periods=(None, None))


def test_writes_are_counted_and_weights_are_constant_between_them():
    """Oracles 43 and 50, in the state of a model that is fed token by token."""
    call, weights, model = jitted(CASES["sequential"])
    tokens, state = tokens_of(25, batch=1), model.init_state(1)
    history = []
    for token in tokens.T:
        _, state = call(weights, token[:, None], state)
        history.append(jax.tree.map(np.asarray, state.state.fast))
    changed = {label: [] for label in history[0]}
    written = 0
    for i in range(1, len(history)):
        for label in changed:
            pairs = list(zip(history[i][label], history[i - 1][label], strict=True))
            if any(new.tobytes() != old.tobytes() for new, old in pairs):
                changed[label].append(i + 1)
                written += sum(new.size for new, _ in pairs)
    # A write of tokens 1..4 waits for token 5 and is kept when its chunk is whole, at token 8.
    assert changed == {"cms.0": [8, 12, 16, 20, 24], "cms.1": [12, 20]}
    sizes = {label: sum(leaf.size for leaf in of) for label, of in history[0].items()}
    per_token = sizes["cms.0"] / PERIOD + sizes["cms.1"] / (2 * PERIOD)
    np.testing.assert_allclose(written / (5 * PERIOD), per_token, rtol=0.11)


def test_reading_without_learning():
    """Inside a chunk nothing is written: `read` after `settle` gives what the model gives."""
    call, weights, model = jitted(CASES["sequential"])
    tokens = tokens_of(20, batch=1)
    whole, _ = call(weights, tokens[:, :LENGTH])
    _, state = call(weights, tokens[:, : LENGTH - 1])
    reading = jax.jit(model.settle)(state)
    assert jax.tree.map(jnp.shape, reading.fast) == jax.tree.map(jnp.shape, state.state.fast)
    read, outputs = jax.jit(model.read), []
    for at in range(LENGTH - 1, 20):
        logits, after = read(tokens[:, at : at + 1], reading)
        jax.tree.map(np.testing.assert_array_equal, after.fast, reading.fast)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, reading)
        reading = after
        outputs.append(logits)
    np.testing.assert_allclose(outputs[0], whole[:, LENGTH - 1 :], atol=1e-4)
    assert bool(jnp.all(jnp.isfinite(jnp.concatenate(outputs, axis=1))))


# Outer gradients.

SMALL = dataclasses.replace(
    attention(in_context(periods=(PERIOD, 2 * PERIOD), form="nested"), dtype="float64"),
    layers=1,
    attention=models.AttentionConfig(heads=2, context=6),
)


def meta_gradient(second_order):
    """`(loss, gradient)(leaves, horizon)` over 12 tokens, and the leaves with their paths."""
    inner = dataclasses.replace(SMALL.cms.inner, second_order=second_order)
    config = dataclasses.replace(SMALL, cms=dataclasses.replace(SMALL.cms, inner=inner))
    graphdef, weights = built(config)
    leaves, structure = jax.tree.flatten(weights)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(weights)]
    tokens = tokens_of(3 * PERIOD, batch=1)

    def loss(leaves, horizon):
        logits = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))(tokens)[0]
        losses = token_losses(logits, tokens)[0]
        return jnp.sum(jnp.where(jnp.arange(losses.size) < horizon, losses, 0.0))

    return jax.jit(jax.value_and_grad(loss)), leaves, paths


def test_outer_gradients(x64):
    """Second order equals finite differences: the start of every block, the inner rates, all else.

    Oracle 52: the first order agrees with it until an update is used.
    """
    second, leaves, paths = meta_gradient(True)
    check_finite_differences(second, leaves, paths)
    first, _, _ = meta_gradient(False)
    check_orders(second, first, leaves, paths)


def check_finite_differences(compute, leaves, paths):
    horizon, rng, step = 3 * PERIOD - 1, np.random.default_rng(1), 1e-6
    _, gradient = compute(leaves, horizon)
    for i, path in enumerate(paths):
        direction = rng.standard_normal(leaves[i].shape)
        up, down = (
            compute([*leaves[:i], leaves[i] + s * direction, *leaves[i + 1 :]], horizon)[0]
            for s in (step, -step)
        )
        numeric = (float(up) - float(down)) / (2 * step)
        assert np.any(gradient[i] != 0), path
        found = float(jnp.sum(gradient[i] * direction))
        np.testing.assert_allclose(found, numeric, rtol=1e-4, atol=1e-7, err_msg=path)
    rates = gradient[paths.index("['rates'].value")]
    assert np.all(rates != 0) and rates.shape == (2, 1)


def check_orders(second, first, leaves, paths):
    for horizon in (PERIOD, 3 * PERIOD - 1):
        pairs = zip(second(leaves, horizon)[1], first(leaves, horizon)[1], paths, strict=True)
        equal = {path: np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b, path in pairs}
        starts = [path for path in equal if "['levels']" in path]
        if horizon == PERIOD:
            assert all(equal.values())
        else:
            assert len(starts) == 4 and not any(equal[path] for path in starts)


# Configurations.


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="needs at least one block"):
        models.CMSConfig(periods=(), hidden=4)
    with pytest.raises(ValueError, match="64 does not divide 96"):
        models.CMSConfig(periods=(64, 96), hidden=4)
    with pytest.raises(ValueError, match="each must be at least 1, or none"):
        models.CMSConfig(periods=(0, 96), hidden=4)
    with pytest.raises(ValueError, match="write nothing in context"):
        models.CMSConfig(periods=(None,), hidden=4, lifetime="in_context")
    with pytest.raises(ValueError, match="'nested' needs two blocks"):
        models.CMSConfig(periods=(64, None), hidden=4, form="nested")
    with pytest.raises(ValueError, match="clip=0"):
        models.InnerConfig(clip=0.0)
    with pytest.raises(ValueError, match="start='frozen' is of form='nested'"):
        models.CMSConfig(periods=(64,), hidden=4, start="frozen")
    with pytest.raises(ValueError, match="weight_decay=0.1 is of optimizer='adamw'"):
        models.InnerConfig(weight_decay=0.1)
    # Where annotations are enforced, as in this suite, they speak first.
    for wrong in ({"form": "stack"}, {"lifetime": "forever"}, {"start": "maml"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong.values()))):
            models.CMSConfig(periods=(64,), hidden=4, **wrong)
    with pytest.raises((ValueError, TypeError), match="lion"):
        models.InnerConfig(optimizer="lion")
