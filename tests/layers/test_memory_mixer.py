"""The slots of a `MemoryMixer` that the models of the package leave empty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nestedjax import memory, models
from nestedjax.layers import MemoryMixer, gates

CONFIG = models.ModelConfig(1, 8, 1)


def mixer(level, **slots):
    return MemoryMixer(
        CONFIG,
        level,
        heads=2,
        key_dim=4,
        learning_rate=gates.sigmoid(),
        rngs=nnx.Rngs(0),
        **slots,
    )


def inputs(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 7, 8)), jnp.float32)


def test_a_memory_is_written_from_what_is_given_and_read_by_the_input():
    """`written=` makes keys, values and gates, and x the queries: token by token, written out."""
    one = mixer(memory.delta_net(4, 4, chunk_size=3), output=gates.plain(), out=False)
    x, written = inputs(0), inputs(1)
    found, state = one(x, written=written)
    q, k, v = (
        one.projections[name](source)
        for name, source in (("queries", x), ("keys", written), ("values", written))
    )
    rate = one.gates["learning_rate"](written)
    for b in range(2):
        for h in range(2):
            M = np.zeros((4, 4))
            for t in range(7):
                key, value, eta = (np.asarray(a[b, t, h], np.float64) for a in (k, v, rate))
                M = M - eta * np.outer(M @ key - value, key)
                y = np.asarray(found).reshape(2, 7, 2, 4)[b, t, h]
                np.testing.assert_allclose(y, M @ np.asarray(q[b, t, h]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(one(x, written=x)[0], one(x)[0], atol=1e-6)
    first, held = one(x[:, :4], written=written[:, :4])
    rest, held = one(x[:, 4:], held, written=written[:, 4:])
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), found, rtol=1e-3, atol=1e-3)


def test_written_does_not_go_around_a_convolution_of_the_input():
    one = mixer(memory.delta_net(4, 4, chunk_size=3), input_conv=2)
    with pytest.raises(ValueError, match="written= goes around input_conv"):
        one(inputs(0), written=inputs(1))


def test_a_threshold_reaches_the_objective_and_learns():
    network = memory.residual_mlp((4, 4, 4))
    one = mixer(
        memory.yaad(network, chunk_size=3),
        keys=gates.unit,
        decay=gates.sigmoid(bias=4.0),
        threshold=gates.sigmoid(maximum=2.0),
        start=gates.learned(network),
    )
    graphdef, weights = nnx.split(one)
    gradient = jax.grad(lambda w: jnp.sum(nnx.merge(graphdef, w)(inputs(0))[0] ** 2))(weights)
    slope = gradient["gates"]["threshold"]["logit"]["kernel"][...]
    assert float(jnp.abs(slope).max()) > 1e-6


def test_a_mixer_of_ttt():
    """TTT's memory in a mixer: means of gradients, token by token, written out."""
    level = memory.ttt(memory.matrix(4, 4), chunk_size=3)
    one = mixer(level, output=gates.plain(), out=False)
    x = inputs(0)
    found, _ = one(x)
    q, k, v = (one.projections[name](x) for name in ("queries", "keys", "values"))
    rate = one.gates["learning_rate"](x)
    q, k, v, rate = (np.asarray(a, np.float64) for a in (q, k, v, rate))
    expected = np.zeros(q.shape)
    for b, h in np.ndindex(2, 2):
        weights = np.zeros((4, 4))
        for t in range(7):
            if t % 3 == 0:
                start, summed = weights, np.zeros((4, 4))
            error = start @ k[b, t, h] - v[b, t, h]
            summed = summed + rate[b, t, h] * np.outer(error, k[b, t, h])
            weights = start - summed / (t % 3 + 1)
            expected[b, t, h] = weights @ q[b, t, h]
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(one(x)[0]))(x)
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)
