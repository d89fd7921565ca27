"""HOPE: streaming, causality, isolation, first loss, sizes and the gradient of every weight."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nestedjax import models
from nestedjax.mixers.self_modifying import SelfModifyingConfig
from nestedjax.models.config import CMSConfig, HopeConfig
from nestedjax.models.language_model import parameter_count

MEMORY = SelfModifyingConfig(heads=2, head_dim=8, hidden=8, chunk_size=4)
TINY = HopeConfig(32, 16, 2, MEMORY, CMSConfig((None, None), 16))


def tokens_of(length=18, batch=2):
    return jnp.asarray(np.random.default_rng(0).integers(0, 32, (batch, length)), jnp.int32)


def test_split_causal_isolated():
    model, tokens = models.build(TINY, rngs=nnx.Rngs(0)), tokens_of()
    graphdef, weights = nnx.split(model)

    @jax.jit
    def call(tokens, state):
        return nnx.merge(graphdef, weights)(tokens, state)

    whole, _ = call(tokens, None)
    state, pieces = model.init_state(2), []
    for first, last in ((0, 6), (6, 12), (12, 18)):
        before = jax.tree.map(lambda a: (a.shape, a.dtype), state)
        logits, state = call(tokens[:, first:last], state)
        assert before == jax.tree.map(lambda a: (a.shape, a.dtype), state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=2e-5)
    other, _ = call(tokens.at[1, 9].add(1) % 32, None)
    assert bool(jnp.all(other[0] == whole[0])) and bool(jnp.all(other[1, :9] == whole[1, :9]))
    assert float(jnp.max(jnp.abs(other[1, 9:] - whole[1, 9:]))) > 1e-4


def test_a_reset_starts_a_new_context():
    model, tokens = models.build(TINY, rngs=nnx.Rngs(0)), tokens_of(16)
    resets = jnp.zeros((2, 16), bool).at[:, 8].set(True)
    packed, _ = model(tokens, resets=resets)
    alone, _ = model(tokens[:, 8:])
    np.testing.assert_allclose(packed[:, 8:], alone, atol=1e-6)


def test_first_loss_is_ln_vocab():
    # Logits of a d-wide model have a standard deviation of d^-1/2: a width that is really used.
    config = dataclasses.replace(models.PRESETS["hope_nano"], vocab=32)
    model, tokens = models.build(config, rngs=nnx.Rngs(0)), tokens_of(64, 8)
    log_probs = jax.nn.log_softmax(jax.jit(model)(tokens)[0])
    loss = -jnp.mean(jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=2))
    assert abs(float(loss) / math.log(32) - 1) < 0.01


def test_every_weight_has_a_gradient():
    model, tokens = models.build(TINY, rngs=nnx.Rngs(0)), tokens_of(16)
    graphdef, weights = nnx.split(model)

    def loss(weights):
        log_probs = jax.nn.log_softmax(nnx.merge(graphdef, weights)(tokens)[0])
        return -jnp.mean(jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=2))

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(weights)):
        assert float(jnp.max(jnp.abs(leaf))) > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("preset", "millions"), [("hope_340m", 347), ("hope_760m", 756), ("hope_1p3b", 1320)]
)
def test_sizes_of_the_paper(preset, millions):
    model = nnx.eval_shape(lambda: models.build(preset, rngs=nnx.Rngs(0)))
    assert abs(parameter_count(model) / (millions * 1e6) - 1) < 0.03
