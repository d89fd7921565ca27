"""Labels and periods of a model's weights, and the optimizer made from them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from nestedjax import models
from nestedjax.layers import SelfModifyingConfig

MEMORY = SelfModifyingConfig(heads=2, head_dim=4, hidden=4, chunk_size=4)
CMS = models.CMSConfig(periods=(None, 64, 256), hidden=8)
CONFIG = models.HopeConfig(16, 8, 2, MEMORY, CMS)


@pytest.fixture(scope="module")
def abstract():
    return nnx.eval_shape(lambda: models.build(CONFIG, rngs=nnx.Rngs(0)))


def test_every_timed_block_has_its_label(abstract):
    params = nnx.state(abstract, nnx.Param)
    found = jax.tree.leaves(models.labels(params, CONFIG))
    assert len(found) == len(jax.tree.leaves(params))
    named = {}
    for (path, leaf), label in zip(jax.tree_util.tree_leaves_with_path(params), found, strict=True):
        named.setdefault(label, []).append((jax.tree_util.keystr(path), leaf.shape))
    assert {label: len(of) for label, of in named.items() if label} == {"cms.1": 2, "cms.2": 2}
    assert all("['levels'][1]" in path for path, _ in named["cms.1"])
    assert models.periods(CONFIG) == {"": None, "cms.1": 64, "cms.2": 256}
    assert models.periods(models.PRESETS["transformer_nano"]) == {"": None}


def test_the_optimizer_steps_each_block_when_it_is_due(abstract):
    tx = models.optimizer(abstract, lambda period: optax.sgd(1.0 / period), step_tokens=32)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), nnx.state(abstract, nnx.Param))
    names = jax.tree.leaves(models.labels(params, CONFIG))

    def body(state, _):
        updates, state = tx.update(params, state, params)
        return state, [leaf.reshape(-1)[0] for leaf in jax.tree.leaves(updates)]

    _, moved = jax.jit(lambda s: jax.lax.scan(body, s, None, length=16))(tx.init(params))
    for label, values in zip(names, moved, strict=True):
        every = {"": 1, "cms.1": 2, "cms.2": 8}[label]
        expected = [-1.0 / every if (i + 1) % every == 0 else 0.0 for i in range(16)]
        assert values.tolist() == expected


def test_a_period_that_does_not_fit_the_step(abstract):
    with pytest.raises(ValueError, match="48 tokens in one step.*set cms.periods to none 96 288"):
        models.optimizer(abstract, lambda period: optax.sgd(0.1), step_tokens=48)
