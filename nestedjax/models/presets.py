"""The named sizes of every architecture."""

from nestedjax.mixers.self_modifying import SelfModifyingConfig
from nestedjax.models.config import AttentionConfig, CMSConfig, HopeConfig, TransformerConfig


def _swiglu(width: int) -> int:
    """Hidden width of a SwiGLU network with about 8 width^2 parameters (spec F1)."""
    return -(-8 * width // (3 * 256)) * 256 if width >= 256 else 8 * width // 3


def _transformer(vocab: int, width: int, layers: int, heads: int, context: int, **switches):
    attention = AttentionConfig(heads=heads, context=context)
    return TransformerConfig(vocab, width, layers, _swiglu(width), attention, **switches)


def _hope(vocab: int, width: int, layers: int, heads: int, **switches) -> HopeConfig:
    """Heads of width / heads features, memories as wide, four continuum blocks (spec E)."""
    memory = SelfModifyingConfig(heads=heads, head_dim=width // heads, hidden=width // heads)
    cms = CMSConfig(periods=(None, None, None, None), hidden=width)
    return HopeConfig(vocab, width, layers, memory, cms, **switches)


LARGE = {"dtype": "bfloat16", "remat": "full"}

PRESETS = {
    "hope_nano": _hope(256, 128, 3, 2),
    "hope_micro": _hope(8192, 256, 6, 4),
    "hope_mini": _hope(8192, 512, 8, 8, remat="dots"),
    "hope_340m": _hope(32000, 1024, 22, 16, **LARGE),
    "hope_760m": _hope(32000, 1536, 22, 16, **LARGE),
    "hope_1p3b": _hope(32000, 2048, 22, 16, **LARGE),
    "transformer_nano": _transformer(256, 64, 2, 2, 256),
    "transformer_micro": _transformer(8192, 256, 6, 4, 1024),
    "transformer_mini": _transformer(8192, 512, 8, 8, 2048, remat="dots"),
    "transformer_340m": _transformer(32000, 1024, 24, 16, 4096, **LARGE),
    "transformer_760m": _transformer(32000, 1536, 25, 16, 4096, **LARGE),
    "transformer_1p3b": _transformer(32000, 2048, 25, 16, 4096, **LARGE),
}
