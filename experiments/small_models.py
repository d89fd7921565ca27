"""The models that the experiments on small tasks compare: equal widths, depths, feed-forwards.

One place for the settings of each; an experiment's own table changes what it is about.
"""

import dataclasses
import math
from typing import Any

from nestedjax import layers, models

WIDTH, LAYERS, HEADS = 64, 2, 4
HIDDEN = 176  # of every SwiGLU network: 8/3 of the width
CONV = 4  # tokens of every short convolution
CONTEXT = 1024  # tokens that attention sees: all of every task
# The presets' 0.02 is for text: with it AdamW moves the table by a fifth of its size a step, and
# recall and bAbI are learned later or not at all (LOG.md).
EMBEDDING = {"embedding_std": 1.0}

# HOPE as its presets have it, in chunks of 8 tokens; an MLP memory is four times as wide inside.
LINEAR = dataclasses.replace(
    models.PRESETS["hope_linear_nano"].memory,
    head_dim=WIDTH // HEADS,
    hidden=WIDTH // HEADS,
    chunk_size=8,
    gate_gain=math.sqrt(WIDTH // HEADS),
)
MLP = dataclasses.replace(
    LINEAR,
    architecture="mlp",
    hidden=4 * WIDTH // HEADS,
    rule=dataclasses.replace(LINEAR.rule, written="outer", step="normalised"),
)
PROJECTIONS = tuple(name for name in layers.MEMORIES if name != "memory")


def hope(
    vocab: int,
    memory: layers.SelfModifyingConfig = MLP,
    *,
    layers: int = LAYERS,
    writes: bool = True,
    **changes: Any,
) -> models.HopeConfig:
    """HOPE with one continuum block, which is then a SwiGLU network like the others'.

    Args:
      vocab: tokens.
      memory: `MLP` or `LINEAR`.
      layers: blocks.
      writes: whether anything is written into the memories.
      **changes: of fields of the memory.
    """
    held = dataclasses.replace(memory, **changes)
    block = models.CMSConfig(periods=(None,), hidden=HIDDEN, mlp="swiglu")
    return models.HopeConfig(vocab, WIDTH, layers, held, block, writes=writes, **EMBEDDING)


def transformer(vocab: int, *, layers: int = LAYERS, conv: int = CONV) -> models.TransformerConfig:
    """Transformer++ with HOPE's convolution in front of its projections."""
    attention = models.AttentionConfig(heads=HEADS, context=CONTEXT, conv=conv)
    return models.TransformerConfig(vocab, WIDTH, layers, HIDDEN, attention, **EMBEDDING)


def deltanet(vocab: int, *, layers: int = LAYERS) -> models.DeltaNetConfig:
    """DeltaNet, whose convolutions are on queries, keys and values."""
    return models.DeltaNetConfig(vocab, WIDTH, layers, HIDDEN, HEADS, 32, CONV, **EMBEDDING)


def gated_deltanet(vocab: int, *, layers: int = LAYERS) -> models.GatedDeltaNetConfig:
    """Gated DeltaNet, whose convolutions are on queries, keys and values."""
    return models.GatedDeltaNetConfig(vocab, WIDTH, layers, HIDDEN, HEADS, 32, CONV, **EMBEDDING)
