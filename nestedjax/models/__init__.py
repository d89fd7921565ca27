"""Language models: slow weights in flax modules, fast weights in plain state."""

from nestedjax.models.build import Model, build
from nestedjax.models.config import (
    AttentionConfig,
    CMSConfig,
    HopeAttentionConfig,
    HopeConfig,
    InnerConfig,
    TransformerConfig,
)
from nestedjax.models.functional import Definition, abstract, create, merge, split, weights
from nestedjax.models.in_context import InContextModel, Reading, adapting
from nestedjax.models.language_model import LanguageModel, logical_axes, parameter_count
from nestedjax.models.matrices import add_taps, matrix_axes
from nestedjax.models.periods import labels, optimizer, periods, step_tokens_by_label
from nestedjax.models.presets import PRESETS, STEP_TOKENS

__all__ = [
    "PRESETS",
    "STEP_TOKENS",
    "AttentionConfig",
    "CMSConfig",
    "Definition",
    "HopeAttentionConfig",
    "HopeConfig",
    "InContextModel",
    "InnerConfig",
    "LanguageModel",
    "Model",
    "Reading",
    "TransformerConfig",
    "abstract",
    "adapting",
    "add_taps",
    "build",
    "create",
    "labels",
    "logical_axes",
    "matrix_axes",
    "merge",
    "optimizer",
    "parameter_count",
    "periods",
    "split",
    "step_tokens_by_label",
    "weights",
]
