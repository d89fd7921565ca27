"""Optimizers as a run assembles them: what is clipped and logged, and which learning rate acts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nestedjax as nj
from nestedjax import models, optim, run, training
from tests.run.tiny import HOPE, TRANSFORMER

STEPS = 8


@pytest.fixture(autouse=True)
def standard():
    """Adam's bias correction in optax raises a float to an int power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_taps_are_not_clipped():
    """With taps 80 times as large as the gradients an update is the one without a clip."""

    def made(**changes):
        config = nj.run_preset("transformer_nano", TRANSFORMER, optimizer="dgd", **changes)
        built = run.build(config)
        return built, run.optimizer(config, built.model)[0]

    built, tx = made(clip=1.0, warmup=0, learning_rate=0.1)
    params = built.draw()
    gradients = jax.tree.map(
        lambda p, tap: jnp.full_like(p, 80.0 if tap else 1e-3), params, optim.taps_in(params)
    )
    assert any(jax.tree.leaves(optim.taps_in(params))) and optim.gradient_norm(gradients) < 1
    clipped, free = (
        jax.jit(lambda g, tx=tx: tx.update(g, tx.init(params), params)[0])(gradients)
        for tx in (tx, made(clip=None, warmup=0, learning_rate=0.1)[1])
    )
    jax.tree.map(np.testing.assert_array_equal, clipped, free)


def test_taps_are_not_in_the_logged_norm():
    def loss(params, batch):
        x = batch["tokens"]
        return jnp.mean(optim.tapped_linear(x, params["kernel"], params["tap"])), {}

    params = {"kernel": jnp.ones((2, 1)), "tap": jnp.zeros((2, 2))}
    x = jnp.array([[30.0, 40.0]])
    dispatch = training.make_dispatch(training.stateless(loss), optim.dgd(0.1))
    state = training.init_state(params, optim.dgd(0.1), seed=0)
    _, healthy, metrics = dispatch(state, jnp.array(True), {"tokens": x[None, None]})
    assert healthy and float(metrics["grad_norm"][0]) == 50.0


@pytest.mark.parametrize("form", ["sequential", "nested"])
def test_a_write_takes_the_learning_rate_of_its_step(form):
    """Blocks of periods 1, 2 and 4 in a warm-up: AdamW moves by the rate for equal gradients."""
    settings = {**HOPE, "cms.periods": (None, 128, 256), "cms.form": form}
    more = dict(length=16, batch=4, steps=4 * STEPS, warmup=STEPS, clip=None, optimizer="adamw")
    config = nj.run_preset("hope_nano", settings, **more, weight_decay=0.0, learning_rate=1e-3)
    built = run.build(config)
    tx, schedule = run.optimizer(config, built.model)
    params = built.draw()
    labels = models.labels(params, config.model)

    def body(state, step):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        rates = jax.tree.map(lambda u: -u.ravel()[0], updates)
        return state, (rates, schedule(step))

    scan = jax.jit(lambda: jax.lax.scan(body, tx.init(params), jnp.arange(STEPS)))
    _, (rates, recorded) = scan()
    np.testing.assert_allclose(recorded, np.arange(STEPS) / STEPS * 1e-3, rtol=1e-5)
    seen = set()
    for label, found in zip(jax.tree.leaves(labels), jax.tree.leaves(rates), strict=True):
        period = {"cms.1": 2, "cms.2": 4}.get(label, 1)
        due = (np.arange(STEPS) + 1) % period == 0
        if form == "nested" and label in ("cms.0", "cms.1"):
            continue  # it jumps to its start, which hides its update
        np.testing.assert_allclose(found, np.where(due, recorded, 0), rtol=1e-4, atol=1e-9)
        seen.add(label)
    assert "cms.2" in seen and "" in seen


def test_weight_decay_of_a_write_takes_the_learning_rate_of_its_step():
    config = nj.run_preset(
        "hope_nano", HOPE, length=16, batch=4, steps=32, warmup=STEPS, weight_decay=0.5
    )
    built = run.build(config)
    tx, schedule = run.optimizer(config, built.model)
    params = built.draw()
    labels = models.labels(params, config.model)
    decays = models.weight_decays(params)

    def body(state, _):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return state, updates

    scan = jax.jit(lambda: jax.lax.scan(body, tx.init(params), None, length=STEPS))
    _, updates = scan()
    checked = set()
    for label, decay, w, found in zip(
        *map(jax.tree.leaves, (labels, decays, params, updates)), strict=True
    ):
        if not decay:
            continue
        for step in range(STEPS):
            due = (step + 1) % (2 if label == "cms.1" else 1) == 0
            expected = -0.5 * float(schedule(step)) * np.asarray(w) if due else 0 * np.asarray(w)
            np.testing.assert_allclose(found[step], expected, rtol=1e-4, atol=1e-9)
        checked.add(label)
    assert "cms.1" in checked
