"""AdamW and the schedule against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestedjax import optim


@pytest.fixture(autouse=True)
def standard():
    """Adam's bias correction in optax raises a float to an int power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_warmup_cosine_is_the_formula():
    schedule = optim.warmup_cosine(0.3, steps=50, warmup=10, final_fraction=0.2)

    def formula(step):
        if step < 10:
            return 0.3 * step / 10
        along = min(step - 10, 40) / 40
        return 0.06 + 0.24 * 0.5 * (1 + np.cos(np.pi * along))

    for step in (0, 1, 9, 10, 11, 30, 50, 60):
        np.testing.assert_allclose(schedule(step), formula(step), rtol=1e-5, atol=1e-8)
    assert float(optim.warmup_cosine(1.0, steps=4, warmup=100)(2)) == 1.0  # cut to half
    assert float(optim.warmup_cosine(1.0, steps=4)(0)) == 1.0
    with pytest.raises(ValueError, match="steps=0"):
        optim.warmup_cosine(1.0, steps=0)


def test_warmup_stable_decay_is_the_formula_and_knows_its_end_only_in_the_cooldown():
    options = {"warmup": 10, "cooldown": 20, "final_fraction": 0.2}
    schedule = optim.warmup_stable_decay(0.3, steps=50, **options)

    def formula(step):
        return min(0.3 * step / 10, 0.3, 0.3 - 0.24 * min(max(step - 30, 0), 20) / 20)

    for step in (0, 1, 9, 10, 29, 30, 31, 49, 50, 60):
        np.testing.assert_allclose(schedule(step), formula(step), rtol=1e-5, atol=1e-8)
    longer = optim.warmup_stable_decay(0.3, steps=500, **options)
    steps = np.arange(30)
    np.testing.assert_array_equal(longer(steps), schedule(steps))
    assert float(optim.warmup_stable_decay(1.0, steps=100)(80)) == 1.0  # a fifth
    for wrong, says in (({"steps": 0}, "steps=0"), ({"steps": 9, "cooldown": 10}, "cooldown=10")):
        with pytest.raises(ValueError, match=says):
            optim.warmup_stable_decay(1.0, **wrong)


def test_adamw_decays_matrices_only():
    rate, decay, eps = 0.1, 0.5, 1e-8
    tx = optim.adamw(rate, weight_decay=decay, b1=0.9, b2=0.95)
    params = {"w": np.full((2, 2), 2.0, np.float32), "b": np.full(2, 2.0, np.float32)}
    gradient = {"w": np.full((2, 2), 3.0, np.float32), "b": np.full(2, -3.0, np.float32)}
    update, _ = tx.update(gradient, tx.init(params), params)
    for name in params:
        g = gradient[name]
        # Bias correction of the first step: both moments are the gradient's own.
        step = g / (np.abs(g) + eps) + (decay * params[name] if name == "w" else 0.0)
        np.testing.assert_allclose(update[name], -rate * step, rtol=1e-5)
    free = optim.adamw(rate, weight_decay=0.0)
    a, _ = free.update(gradient, free.init(params), params)
    b, _ = optax.adamw(rate, 0.9, 0.95, weight_decay=0.0).update(
        gradient, optax.adamw(rate, 0.9, 0.95).init(params), params
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_adamw_of_low_precision_keeps_wide_moments():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    tx = optim.adamw(0.1)
    updates, state = tx.update(params, tx.init(params), params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {"float32"}
    assert updates["w"].dtype == jnp.bfloat16


def test_a_mask_says_what_decays():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optim.adamw(0.1, weight_decay=0.5, mask=lambda tree: {"w": False, "b": True})
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["b"], -0.05 * np.ones(2), rtol=1e-6)
    assert not np.asarray(updates["w"]).any()


def test_moments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="b2=1.5 must be at least 0 and less than 1"):
        optim.adamw(0.1, b2=1.5)
