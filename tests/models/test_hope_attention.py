"""HOPE-Attention and Transformer++; level stacking; the order of a model's levels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nestedjax import levels, models, optim
from tests.models.families import ATTENTION, FAMILIES, LAYERS, VOCAB, WIDTH, built, tokens_of

TRANSFORMER = FAMILIES["transformer"]


@pytest.fixture(autouse=True)
def lax_promotion():
    """Adam's bias correction in optax raises a float to an int power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def attention_model(periods, **changes):
    cms = models.CMSConfig(periods=periods, hidden=TRANSFORMER.hidden, mlp="swiglu", **changes)
    return models.HopeAttentionConfig(VOCAB, WIDTH, LAYERS, ATTENTION, cms)


def stacked(config, *, silent=()):
    """A HOPE-Attention model with every block the transformer's own network.

    The output of the blocks in `silent` is zero.
    """
    pretrained = built(TRANSFORMER)[1]
    graphdef, weights = built(config)
    block = pretrained["blocks"][0]
    feed = block["feed_forward"]["network"]

    def copied(tree):
        return jax.tree.map(lambda leaf: leaf, tree)

    weights = copied(weights)
    for name in ("embed", "norm"):
        weights[name] = copied(pretrained[name])
    for name in ("mixer", "mixer_norm"):
        weights["blocks"][0][name] = copied(block[name])
    cms = weights["blocks"][0]["feed_forward"]
    for index in range(len(config.cms.periods)):
        cms["levels"][index] = copied(feed)
        if index in silent:
            cms["levels"][index]["wo"] = jax.tree.map(jnp.zeros_like, feed["wo"])
    for index in cms["norms"]:
        cms["norms"][index] = copied(block["feed_forward_norm"])
    if config.cms.form == "headwise":
        cms["weights"] = jax.tree.map(jnp.zeros_like, cms["weights"])
    return nnx.merge(graphdef, weights)


@pytest.fixture(scope="module")
def transformer_logits():
    graphdef, weights = built(TRANSFORMER)
    return jax.jit(nnx.merge(graphdef, weights))(tokens_of(10))[0]


def test_one_frozen_swiglu_block_is_transformer_plus_plus(transformer_logits):
    """Oracle 51, and level stacking by depth: bit for bit."""
    for periods in ((None,), (64,)):
        model = stacked(attention_model(periods))
        np.testing.assert_array_equal(jax.jit(model)(tokens_of(10))[0], transformer_logits)


def test_level_stacking_preserves_the_function(transformer_logits):
    """Oracle 48: faster blocks with zero outputs beside the pretrained one, or equal shares."""
    extra = stacked(attention_model((16, 64, None)), silent=(0, 1))
    np.testing.assert_allclose(jax.jit(extra)(tokens_of(10))[0], transformer_logits, atol=1e-5)
    shares = stacked(attention_model((16, 64, None), form="headwise"))
    np.testing.assert_allclose(jax.jit(shares)(tokens_of(10))[0], transformer_logits, atol=1e-4)


def test_order_of_levels():
    """Oracle 53: attention is the fastest, then the blocks by period, then what is frozen."""
    config = FAMILIES["hope_attention_headwise"]
    model = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
    found = {}
    for box in model.boxes():
        found.setdefault(box.level, set()).add(box.name)
    found = [found[level] for level in sorted(found)]
    assert found[-1] == {"attention"}
    assert {"cms.0 start", "cms.1 start", "cms.2", "embedding", "inner rates"} <= found[0]
    place = {name: i for i, level in enumerate(found) for name in level}
    assert place["cms.1"] < place["cms.1 first moment"] < place["cms.0"]
    assert place["cms.1 first moment"] == place["cms.1 second moment"]
    assert place["cms.0"] < place["cms.0 first moment"] < place["attention"]
    assert {box.frequency for box in model.boxes() if box.name == "attention"} == {math.inf}


@pytest.mark.parametrize("name", ["hope_nano", "hope_attention_nano", "transformer_nano"])
def test_a_preset_and_its_optimizer_as_a_table(name):
    model = nnx.eval_shape(lambda: models.build(name, rngs=nnx.Rngs(0)))
    step = models.SIZES["nano"].step_tokens
    tx = models.optimizer(model, lambda period: optax.adamw(1e-3), step_tokens=step)
    state = jax.eval_shape(tx.init, nnx.state(model, nnx.Param))
    tokens = models.step_tokens_by_label(model.config, step_tokens=step)
    boxes = levels.describe(model, optim.boxes_of(state), step_tokens=tokens)
    rows = [line for line in levels.table(boxes).splitlines() if line.startswith("    ")]
    assert len(boxes) == len(rows) <= 40
    found = {box.name: box for box in boxes}
    trained = sum(box.parameters for box in boxes if box.rule == "optimizer")
    assert trained == models.parameter_count(model)
    assert found["embedding"].period == found["first moment"].period == step
    for i, period in enumerate(model.config.cms.periods if "hope" in name else ()):
        assert found[f"cms.{i}"].period == found[f"cms.{i} second moment"].period == period
        assert found[f"cms.{i}"].level < found[f"cms.{i} first moment"].level
        if period > step:
            assert found[f"cms.{i} gradient accumulator"].period == step
