"""The named sizes of every architecture; one name is one size, whatever the architecture."""

import dataclasses
from typing import Any

from nestedjax.mixers.self_modifying import SelfModifyingConfig
from nestedjax.models.config import (
    AttentionConfig,
    CMSConfig,
    HopeAttentionConfig,
    HopeConfig,
    TransformerConfig,
)

# Tokens in one optimizer step (batch x length) of the runs that the presets are made for. The
# periods of the continuum memories are multiples of it, so a run's own must divide them.
STEP_TOKENS = {
    "nano": 2048,
    "micro": 8192,
    "mini": 16384,
    "340m": 2**19,
    "760m": 2**19,
    "1p3b": 2**19,
}
# Optimizer steps between two writes of each block, the fastest first.
STEPS = (1, 2, 4, 8)

# vocab, width, layers of HOPE, heads, tokens of a chunk, tokens that attention sees
SIZES = {
    "nano": (256, 128, 2, 4, 32, 256),
    "micro": (8192, 256, 6, 4, 16, 1024),
    "mini": (8192, 512, 8, 8, 16, 2048),
    "340m": (32000, 1024, 22, 16, 16, 4096),
    "760m": (32000, 1536, 22, 16, 16, 4096),
    "1p3b": (32000, 2048, 22, 16, 16, 4096),
}
LARGE = {"dtype": "bfloat16", "remat": "full"}
SWITCHES: dict[str, dict[str, Any]] = {
    "nano": {},
    "micro": {},
    "mini": {"remat": "dots"},
    "340m": LARGE,
    "760m": LARGE,
    "1p3b": LARGE,
}


def _cms(size: str, hidden: int) -> CMSConfig:
    return CMSConfig(periods=tuple(n * STEP_TOKENS[size] for n in STEPS), hidden=hidden)


def _hope(size: str) -> HopeConfig:
    """Heads of width / heads features, memories as wide, four continuum blocks (spec E)."""
    vocab, width, layers, heads, chunk, _ = SIZES[size]
    wide = width // heads
    memory = SelfModifyingConfig(heads=heads, head_dim=wide, hidden=wide, chunk_size=chunk)
    return HopeConfig(vocab, width, layers, memory, _cms(size, width), **SWITCHES[size])


def _attention(size: str) -> tuple[int, int]:
    """Blocks of an attention model as large as HOPE, and parameters left for each one's network."""
    _, width, layers, heads, _, _ = SIZES[size]
    total = layers * (13 * width**2 + 10 * width * (width // heads))  # spec E
    blocks = round(total / (12 * width**2))
    return blocks, total // blocks - 4 * width**2


def _rounded(hidden: float, width: int) -> int:
    unit = 64 if width >= 1024 else 8
    return round(hidden / unit) * unit


def _hope_attention(size: str) -> HopeAttentionConfig:
    vocab, width, _, heads, _, context = SIZES[size]
    blocks, left = _attention(size)
    cms = _cms(size, _rounded(left / (2 * width * len(STEPS)), width))
    attention = AttentionConfig(heads=heads, context=context)
    return HopeAttentionConfig(vocab, width, blocks, attention, cms, **SWITCHES[size])


def _transformer(size: str) -> TransformerConfig:
    vocab, width, _, heads, _, context = SIZES[size]
    blocks, left = _attention(size)
    hidden = _rounded(left / (3 * width), width)
    attention = AttentionConfig(heads=heads, context=context)
    return TransformerConfig(vocab, width, blocks, hidden, attention, **SWITCHES[size])


def _literal(size: str) -> HopeConfig:
    """The equations as printed, errata applied (spec I): one head as wide as the model, nothing
    projected but the query, chunk-start reads, no momentum, no clip of the inner error."""
    config, width = _hope(size), SIZES[size][1]
    memory = SelfModifyingConfig(
        heads=1, head_dim=width, hidden=width, read="anchor", momentum=False, inner_clip=None
    )
    return dataclasses.replace(config, memory=memory, literal=True)


PRESETS = {
    **{f"hope_{size}": _hope(size) for size in SIZES},
    **{f"hope_attention_{size}": _hope_attention(size) for size in SIZES},
    **{f"transformer_{size}": _transformer(size) for size in SIZES},
    "hope_nano_literal": _literal("nano"),
}
