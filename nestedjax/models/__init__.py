"""Language models, one file an architecture: its configuration, its block, its presets.

Importing an architecture here is what makes it known to every command, test and page of the docs.
"""

from nestedjax.layers import AttentionConfig, CMSConfig, InnerConfig, SelfModifyingConfig
from nestedjax.models.block import Block
from nestedjax.models.build import Model, build
from nestedjax.models.config import ModelConfig
from nestedjax.models.deltanet import DeltaNetConfig
from nestedjax.models.functional import Definition, abstract, create, merge, split, weights
from nestedjax.models.gated_deltanet import GatedDeltaNetConfig
from nestedjax.models.hope import HopeConfig
from nestedjax.models.hope_attention import HopeAttentionConfig
from nestedjax.models.in_context import InContextModel, Reading, adapting
from nestedjax.models.language_model import LanguageModel, logical_axes, parameter_count
from nestedjax.models.linear_attention import LinearAttentionConfig
from nestedjax.models.matrices import add_taps, matrix_axes, weight_decays
from nestedjax.models.periods import labels, optimizer, periods, step_tokens_by_label
from nestedjax.models.presets import PRESETS, SIZES, Size, fitted, presets, size_of
from nestedjax.models.recurrent import RecurrentConfig
from nestedjax.models.retnet import RetNetConfig
from nestedjax.models.switch import gate_ranges, memory_starts, switched, switches, watched
from nestedjax.models.transformer import TransformerConfig

__all__ = [
    "PRESETS",
    "SIZES",
    "AttentionConfig",
    "Block",
    "CMSConfig",
    "Definition",
    "DeltaNetConfig",
    "GatedDeltaNetConfig",
    "HopeAttentionConfig",
    "HopeConfig",
    "InContextModel",
    "InnerConfig",
    "LanguageModel",
    "LinearAttentionConfig",
    "Model",
    "ModelConfig",
    "Reading",
    "RecurrentConfig",
    "RetNetConfig",
    "SelfModifyingConfig",
    "Size",
    "TransformerConfig",
    "abstract",
    "adapting",
    "add_taps",
    "build",
    "create",
    "fitted",
    "gate_ranges",
    "labels",
    "logical_axes",
    "matrix_axes",
    "memory_starts",
    "merge",
    "optimizer",
    "parameter_count",
    "periods",
    "presets",
    "size_of",
    "split",
    "step_tokens_by_label",
    "switched",
    "switches",
    "watched",
    "weight_decays",
    "weights",
]
