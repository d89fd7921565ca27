"""Blocks that architectures to come need: patterns, absent and stateful halves, a shared value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nestedjax import layers, levels, models

WIDTH = 4


class Shift(layers.Layer):
    """Adds the token before, channel by channel mixed: a feed-forward network with a state."""

    name = "channel mixing"

    def __init__(self, config, *, rngs):
        axes = ("embed", "mlp")
        self.mix = layers.Linear(
            (WIDTH,), (WIDTH,), axes, dtype=config.dtype, rngs=rngs, scale=20.0
        )

    def init_state(self, batch):
        return {"last": jnp.zeros((batch, 1, WIDTH))}

    def __call__(self, x, state=None, *, resets=None):
        last = (state or self.init_state(x.shape[0]))["last"]
        before = jnp.concatenate([last, x], axis=1)
        if resets is not None:
            before = jnp.where(jnp.pad(resets, ((0, 0), (0, 1)))[..., None], 0.0, before)
        return self.mix(before[:, :-1] + x), {"last": before[:, -1:]}

    def boxes(self, state):
        return [levels.Box(self.name, None, WIDTH * WIDTH, 0, "next token", "", "param")]


class Value(Shift):
    """Hands the values of the first block to those above, which add them (as RWKV-7 does)."""

    name = "value"
    shares = True

    def __call__(self, x, state=None, *, resets=None, first=None):
        y, state = Shift.__call__(self, x, state, resets=resets)
        return (y if first is None else y + first), state, y


@dataclasses.dataclass(frozen=True)
class Samba(models.ModelConfig):
    """Two kinds of blocks in turn, the first without a feed-forward network."""

    @property
    def pattern(self):
        return 2

    def block(self, *, rngs):
        attention = layers.AttentionConfig(heads=2, context=4)
        alone = models.Block(self, Shift(self, rngs=rngs))
        mixed = layers.Attention(self, attention, rngs=rngs)
        return alone, models.Block(self, mixed, Shift(self, rngs=rngs))


@dataclasses.dataclass(frozen=True)
class Shared(models.ModelConfig):
    """Every block adds the value of the first."""

    def block(self, *, rngs):
        return models.Block(self, Value(self, rngs=rngs), Shift(self, rngs=rngs))


def noisy(config, scale=0.3):
    graphdef, weights = nnx.split(models.build(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype),
        weights,
    )
    return nnx.merge(graphdef, weights)


@pytest.mark.parametrize("config", [Samba(8, WIDTH, 4), Shared(8, WIDTH, 3)])
@pytest.mark.parametrize("remat", ["none", "tokens", "full"])
def test_one_call_is_any_split_and_every_weight_matters(config, remat):
    model = noisy(dataclasses.replace(config, remat=remat))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 8, (2, 9)), jnp.int32)
    whole, end = jax.jit(model)(tokens)
    start = model.init_state(2)
    assert jax.tree.structure(start) == jax.tree.structure(end)
    first, state = model(tokens[:, :4])
    rest, state = model(tokens[:, 4:], state)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, rtol=1e-5, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, end)
    fresh, _ = model(tokens[:, :4], start)
    np.testing.assert_allclose(fresh, first, rtol=1e-5, atol=1e-5)
    graphdef, weights = nnx.split(model)
    gradient = jax.grad(lambda w: jnp.sum(jnp.sin(nnx.merge(graphdef, w)(tokens)[0])))(weights)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_the_first_blocks_value_reaches_every_block():
    """Written out block by block."""
    model = noisy(Shared(8, WIDTH, 3))
    tokens = jnp.asarray([[1, 5, 2, 7]], jnp.int32)
    x, first = model.embed(tokens), None
    graphdef, weights = nnx.split(model.blocks)
    for index in range(3):
        own = jax.tree.map(lambda leaf, index=index: leaf[index], weights)
        block = nnx.merge(graphdef, own)[0]
        y, _, value = block.mixer(block.mixer_norm(x), first=first)
        first = value if index == 0 else first
        x = x + y
        x = x + block.feed_forward(block.feed_forward_norm(x))[0]
    expected = model.embed.attend(model.norm(x))
    np.testing.assert_allclose(model(tokens)[0], expected, atol=1e-5)


def test_probes_and_boxes_name_the_halves_of_every_block():
    model = noisy(Samba(8, WIDTH, 4))
    tokens = jnp.zeros((1, 3), jnp.int32)
    found = model.probe(tokens)
    names = ["embed", "blocks.0.channel mixing", "blocks.1.attention", "blocks.1.channel mixing"]
    names += ["blocks.2.channel mixing", "blocks.3.attention", "blocks.3.channel mixing"]
    assert list(found) == [*names, "norm", "logits"]
    np.testing.assert_allclose(found["logits"], model(tokens)[0], atol=1e-5)
    assert {"attention", "channel mixing"} <= {box.name for box in model.boxes()}


def test_a_pattern_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="layers=3 is not a multiple of the pattern of 2 blocks"):
        Samba(8, WIDTH, 3)


def test_a_pattern_that_is_not_told_is_refused():
    class Untold(Samba):
        pattern = 1

    with pytest.raises(ValueError, match="block returns 2 blocks and its pattern is 1"):
        models.build(Untold(8, WIDTH, 4), rngs=nnx.Rngs(0))
