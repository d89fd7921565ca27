"""Language models: slow weights in flax modules, fast weights in plain state."""

from nestedjax.models.build import build
from nestedjax.models.config import AttentionConfig, CMSConfig, HopeConfig, TransformerConfig
from nestedjax.models.language_model import LanguageModel, logical_axes, parameter_count
from nestedjax.models.matrices import add_taps, matrix_axes
from nestedjax.models.periods import labels, optimizer, periods
from nestedjax.models.presets import PRESETS

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "CMSConfig",
    "HopeConfig",
    "LanguageModel",
    "TransformerConfig",
    "add_taps",
    "build",
    "labels",
    "logical_axes",
    "matrix_axes",
    "optimizer",
    "parameter_count",
    "periods",
]
