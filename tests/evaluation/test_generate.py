"""Sampling against a chain whose probabilities are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax.evaluation import generate

LOGITS = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))


def counter(tokens, state):
    """Logits that depend on how many tokens were seen: the next is `count % 4`, for certain."""
    counts = state + 1 + jnp.arange(tokens.shape[1])
    logits = jax.nn.one_hot(counts % 4, 4) * 1000
    return jnp.broadcast_to(logits[None], (tokens.shape[0], *logits.shape)), counts[-1]


def fixed(tokens, state):
    return jnp.broadcast_to(LOGITS, (*tokens.shape, 4)), state


def draw(step, state, **options):
    prompt = jnp.zeros((1, 3), jnp.int32)
    return generate(step, state, prompt, key=jax.random.key(0), **options)


def test_each_token_is_fed_once():
    tokens, state = draw(counter, jnp.zeros((), jnp.int32), tokens=6)
    assert tokens.tolist() == [[3, 0, 1, 2, 3, 0]]
    assert int(state) == 3 + 5  # the last token drawn was not fed


def test_the_distribution_is_the_one_asked_for():
    for options, expected in (
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.5}, np.asarray([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        ({"temperature": 0}, [1, 0, 0, 0]),
    ):
        tokens = np.asarray(draw(fixed, None, tokens=4000, **options)[0])
        shares = np.bincount(tokens[0], minlength=4) / 4000
        np.testing.assert_allclose(shares, expected, atol=0.03)


def test_mistakes():
    with pytest.raises(ValueError, match="at least one token"):
        draw(fixed, None, tokens=0)
    with pytest.raises(ValueError, match="top_k=0"):
        draw(fixed, None, tokens=1, top_k=0)
    for temperature in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"temperature={temperature} must be 0 or more"):
            draw(fixed, None, tokens=1, temperature=temperature)


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-46, 1e-38, 2e-30, 1e-20, 1e-5])
def test_a_small_temperature_takes_the_likeliest(temperature):
    """Also where float32 cannot hold it, or logits divided by it."""
    logits = jnp.asarray([1e4, 1e4 + 1, -1e4, 3.0])

    def step(tokens, state):
        return jnp.broadcast_to(logits, (*tokens.shape, 4)), state

    drawn = draw(step, None, tokens=20, temperature=temperature)[0]
    assert set(np.unique(np.asarray(drawn))) == {1}


def test_what_is_excluded_is_never_drawn():
    logits = jnp.asarray([-jnp.inf, 0.0, -jnp.inf, 2.0, 1.0, -jnp.inf])

    def step(tokens, state):
        return jnp.broadcast_to(logits, (*tokens.shape, 6)), state

    drawn = np.asarray(draw(step, None, tokens=3000)[0])
    assert set(np.unique(drawn)) == {1, 3, 4}
    assert set(np.unique(np.asarray(draw(step, None, tokens=3000, top_k=2)[0]))) == {3, 4}


def test_a_prompt_is_read_at_once_but_for_its_last_token():
    lengths = []

    def step(tokens, state):
        lengths.append(tokens.shape[1])
        return fixed(tokens, state)

    prompt = jnp.zeros((2, 9), jnp.int32)
    assert generate(step, None, prompt, tokens=5, key=jax.random.key(0))[0].shape == (2, 5)
    assert lengths == [8, 1]  # each traced once
    lengths.clear()
    generate(step, None, prompt[:, :1], tokens=5, key=jax.random.key(0))
    assert lengths == [1]
