"""Language models: slow weights in flax modules, fast weights in plain state."""

from nestedjax.models.build import build
from nestedjax.models.config import AttentionConfig, TransformerConfig
from nestedjax.models.language_model import LanguageModel, parameter_count
from nestedjax.models.presets import PRESETS

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "LanguageModel",
    "TransformerConfig",
    "build",
    "parameter_count",
]
