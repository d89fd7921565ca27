"""HOPE: first loss and sizes; what all models share is in `test_contract.py`."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from nestedjax import configs, models
from tests.models.families import built, token_losses, tokens_of


@pytest.mark.parametrize("name", ["hope_nano", "hope_attention_nano", "transformer_nano"])
def test_first_loss_is_ln_vocab(name):
    # Logits of a d-wide model have a standard deviation of d^-1/2: a width that is really used.
    config = dataclasses.replace(models.PRESETS[name], vocab=32, layers=1)
    graphdef, weights = built(config, noise=0.0)
    model, tokens = nnx.merge(graphdef, weights), tokens_of(32, 4)
    loss = float(token_losses(jax.jit(model)(tokens)[0], tokens).mean())
    assert abs(loss / math.log(32) - 1) < 0.01


SIZES = ("nano", "micro", "mini", "340m", "760m", "1p3b")


@pytest.mark.parametrize("size", SIZES)
def test_one_name_is_one_size(size):
    counts = [
        models.parameter_count(
            nnx.eval_shape(lambda name=name: models.build(name, rngs=nnx.Rngs(0)))
        )
        for name in (f"hope_{size}", f"hope_attention_{size}", f"transformer_{size}")
    ]
    np.testing.assert_allclose(counts, counts[0], rtol=0.015)
    published = {"340m": 347e6, "760m": 756e6, "1p3b": 1320e6}  # spec E
    assert size not in published or abs(counts[0] / published[size] - 1) < 0.01


@pytest.mark.parametrize("size", SIZES)
def test_the_blocks_of_a_preset_have_different_periods(size):
    for name in (f"hope_{size}", f"hope_attention_{size}"):
        timed = models.PRESETS[name].cms.timed
        assert len(set(timed)) == 4 and timed[0] == models.STEP_TOKENS[size]
        assert configs.run_preset(name).step_tokens == models.STEP_TOKENS[size]
