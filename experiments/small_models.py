"""The models that the experiments on small tasks compare: equal widths, depths, feed-forwards.

One place for the settings of each; an experiment's own table changes what it is about.
"""

from typing import Any

from nestedjax import models

WIDTH, LAYERS, HEADS = 64, 2, 4
HIDDEN = 176  # of every SwiGLU network: 8/3 of the width
CONV = 4  # tokens of every short convolution
CONTEXT = 1024  # tokens that attention sees: all of every task

# HOPE's memory in the setting of these tasks: one write a token, read after it.
MEMORY: dict[str, Any] = {
    "heads": HEADS,
    "head_dim": WIDTH // HEADS,
    "hidden": WIDTH // HEADS,
    "chunk_size": 1,
    "read": "running",
    "momentum": False,
}


def hope(vocab: int, *, layers: int = LAYERS, **memory: Any) -> models.HopeConfig:
    """HOPE with one continuum block, which is then a SwiGLU network like the others'."""
    held = models.SelfModifyingConfig(**MEMORY | memory)
    block = models.CMSConfig(periods=(None,), hidden=HIDDEN, mlp="swiglu")
    return models.HopeConfig(vocab, WIDTH, layers, held, block)


def transformer(vocab: int, *, layers: int = LAYERS, conv: int = CONV) -> models.TransformerConfig:
    """Transformer++ with HOPE's convolution in front of its projections."""
    attention = models.AttentionConfig(heads=HEADS, context=CONTEXT, conv=conv)
    return models.TransformerConfig(vocab, WIDTH, layers, HIDDEN, attention)


def deltanet(vocab: int, *, layers: int = LAYERS) -> models.DeltaNetConfig:
    """DeltaNet, whose convolutions are on queries, keys and values."""
    return models.DeltaNetConfig(vocab, WIDTH, layers, HIDDEN, HEADS, 32, CONV)


def gated_deltanet(vocab: int, *, layers: int = LAYERS) -> models.GatedDeltaNetConfig:
    """Gated DeltaNet, whose convolutions are on queries, keys and values."""
    return models.GatedDeltaNetConfig(vocab, WIDTH, layers, HIDDEN, HEADS, 32, CONV)
