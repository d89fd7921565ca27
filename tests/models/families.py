"""Tiny models of every family, built and called once per shape."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nestedjax import models
from nestedjax.layers import RuleConfig, SelfModifyingConfig

VOCAB, WIDTH, LAYERS, PERIOD = 24, 8, 2, 4
ATTENTION = models.AttentionConfig(heads=2, context=6, conv=2)
MEMORY = SelfModifyingConfig(heads=2, head_dim=4, hidden=4, chunk_size=4)
LITERAL = SelfModifyingConfig(
    heads=1,
    head_dim=8,
    hidden=8,
    chunk_size=4,
    read="anchor",
    momentum=False,
    rule=RuleConfig(inner_clip=None),
)
STREAM = models.CMSConfig(periods=(None, 64), hidden=6)
IN_CONTEXT = models.CMSConfig(
    periods=(PERIOD, 2 * PERIOD, None),
    hidden=6,
    lifetime="in_context",
    inner=models.InnerConfig(learning_rate=2.0),
)


def attention(cms, **more):
    return models.HopeAttentionConfig(VOCAB, WIDTH, LAYERS, ATTENTION, cms, **more)


def hope(cms, memory=MEMORY, **more):
    return models.HopeConfig(VOCAB, WIDTH, LAYERS, memory, cms, **more)


def in_context(**changes):
    inner = {k: changes.pop(k) for k in list(changes) if hasattr(IN_CONTEXT.inner, k)}
    inner = dataclasses.replace(IN_CONTEXT.inner, **inner)
    return dataclasses.replace(IN_CONTEXT, inner=inner, **changes)


LINEAR = {
    "deltanet": models.DeltaNetConfig,
    "gated_deltanet": models.GatedDeltaNetConfig,
    "retnet": models.RetNetConfig,
    "linear_attention": models.LinearAttentionConfig,
}
FAMILIES = {
    "transformer": models.TransformerConfig(VOCAB, WIDTH, LAYERS, 12, ATTENTION),
    "hope_attention": attention(STREAM),
    "hope": hope(STREAM),
    "hope_literal": hope(STREAM, LITERAL, literal=True),
    "hope_in_context": hope(IN_CONTEXT),
    "hope_attention_nested": attention(in_context(form="nested", optimizer="momentum")),
    "hope_attention_headwise": attention(
        in_context(form="headwise", optimizer="adamw", learning_rate=0.05, mlp="swiglu")
    ),
    **{name: config(VOCAB, WIDTH, LAYERS, 12, 2, PERIOD) for name, config in LINEAR.items()},
}


def small(preset):
    """The memory of a preset, in the sizes of the tests."""
    memory = models.PRESETS[preset].memory
    sizes = {"heads": 2, "head_dim": 4, "hidden": 4, "chunk_size": 4}
    return hope(STREAM, dataclasses.replace(memory, **sizes))


OF_PRESETS = {preset: small(preset) for preset in ("hope_nano", "hope_linear_nano")}


def tokens_of(length, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, VOCAB, (batch, length)), jnp.int32)


@functools.cache
def built(config, noise=0.2, seed=0):
    """`(graphdef, weights)`, with noise that makes every weight matter, in one compilation."""

    def build():
        # A key that costs little to compile.
        return models.build(config, rngs=nnx.Rngs(jax.random.key(seed, impl="unsafe_rbg")))

    graphdef, shapes = nnx.split(nnx.eval_shape(build))
    leaves, structure = jax.tree.flatten(shapes)
    draw = jax.jit(lambda: jax.tree.leaves(nnx.state(build())))
    rng = np.random.default_rng(seed)
    added = [jnp.asarray(noise * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    return graphdef, jax.tree.unflatten(
        structure, [a + b for a, b in zip(draw(), added, strict=True)]
    )


def caller(config):
    """A jitted `call(weights, tokens, state, resets) -> (logits, state)` and the weights."""
    graphdef, weights = built(config)

    def call(weights, tokens, state=None, resets=None):
        return nnx.merge(graphdef, weights)(tokens, state, resets=resets)

    return functools.partial(jax.jit(call), weights), nnx.merge(graphdef, weights)


def token_losses(logits, tokens):
    """Next-token losses, [B, T - 1], written out."""
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=2)[..., 0]
