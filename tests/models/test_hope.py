"""HOPE: first loss and sizes; what all models share is in `test_contract.py`."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nestedjax import models, run, sharding
from nestedjax.layers import SelfModifyingConfig
from nestedjax.models import CMSConfig, HopeConfig
from pallas_kernels.mlp_memory import api, pallas_tpu
from tests.models.families import built, token_losses, tokens_of


@pytest.mark.parametrize("name", ["hope_nano", "hope_attention_nano", "transformer_nano"])
def test_first_loss_is_ln_vocab(name):
    # Logits of a d-wide model have a standard deviation of d^-1/2: a width that is really used.
    config = dataclasses.replace(models.PRESETS[name], vocab=32, layers=1)
    graphdef, weights = built(config, noise=0.0)
    model, tokens = nnx.merge(graphdef, weights), tokens_of(32, 4)
    loss = float(token_losses(jax.jit(model)(tokens)[0], tokens).mean())
    assert abs(loss / math.log(32) - 1) < 0.01


def test_the_kernel_is_the_scan(monkeypatch):
    """Logits, state and every gradient; packed documents, whole chunks and a rest; on a mesh."""
    kernel = functools.partial(pallas_tpu.mlp_memory_pallas_tpu, interpret=True)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "pallas_tpu", kernel)
    memory = SelfModifyingConfig(heads=2, head_dim=4, hidden=6, chunk_size=4)
    config = HopeConfig(24, 8, 1, memory, CMSConfig((None,), 8))
    graphdef, weights = built(config)
    other = nnx.split(
        nnx.eval_shape(
            lambda: models.build(
                dataclasses.replace(config, implementation="pallas_tpu"), rngs=nnx.Rngs(0)
            )
        )
    )[0]
    tokens, resets = tokens_of(11), jnp.arange(11) == 8
    resets = jnp.broadcast_to(resets, (2, 11))

    @functools.partial(jax.jit, static_argnums=0)
    def results(graphdef, weights):
        def total(weights):
            logits, state = nnx.merge(graphdef, weights)(tokens, resets=resets)
            return jnp.sum(jnp.sin(logits)), (logits, state)

        return jax.grad(total, has_aux=True)(weights)

    expected = results(graphdef, weights)
    text = str(jax.make_jaxpr(results, static_argnums=0)(other, weights))
    assert "mlp_memory_forward" in text and "mlp_memory_backward" in text
    mesh = sharding.make_mesh("data=2,tensor=2", explicit=True, devices=jax.devices()[:4])
    axes = models.logical_axes(weights)
    with jax.set_mesh(mesh):
        placed = sharding.place(weights, sharding.shardings_of(weights, axes, mesh))
        found = results(other, placed)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), found, expected
    )


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
        assert len(set(timed)) == 4 and timed[0] == models.SIZES[size].step_tokens
        assert run.run_preset(name).step_tokens == models.SIZES[size].step_tokens
