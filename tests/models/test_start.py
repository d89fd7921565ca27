"""One rule of initialisation: every matrix is drawn by its fan-in, and the first loss is ln(vocab).

The embedding, which is the head, and the memories' own starts are apart.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nestedjax import models

NANO = [name for name in models.PRESETS if "_nano" in name]
APART = ("embedding", "memories", "start")


def matrices(model):
    """Path, value and fan-in of every matrix."""
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        matrix = leaf.get_metadata().get("matrix")
        if matrix is None or any(part in name for part in APART):
            continue
        value = np.asarray(leaf[...])
        axes = matrix.reduction_axis
        axes = (axes,) if isinstance(axes, int) else axes
        yield name, value, math.prod(value.shape[axis] for axis in axes)


@pytest.mark.parametrize("name", NANO)
def test_every_matrix_is_drawn_by_its_fan_in(name):
    config = models.PRESETS[name]
    residual = 1 / math.sqrt(2 * config.layers)
    found = [(n, v.std() * math.sqrt(fan_in)) for n, v, fan_in in matrices(models.create(config))]
    assert found
    for path, factor in found:
        assert min(abs(factor - 1), abs(factor - residual)) < 0.05, (path, factor)


@pytest.mark.parametrize("name", NANO)
def test_the_first_loss_is_that_of_a_uniform_guess(name):
    require_uniform_guess(models.PRESETS[name])


@pytest.mark.parametrize("std", [0.005, 1.0])
def test_the_embedding_starts_as_large_as_asked_for_and_the_first_loss_stays(std):
    config = dataclasses.replace(models.PRESETS["transformer_nano"], embedding_std=std)
    model = models.create(config)
    assert abs(np.asarray(model.embed.embedding[...]).std() / std - 1) < 0.02
    require_uniform_guess(config)


def require_uniform_guess(config):
    model = models.create(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 65), 0, config.vocab)
    logits, _ = model(tokens[:, :-1])
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()
    assert abs(loss - math.log(config.vocab)) < 0.05
