"""Slow layers and sequence mixers as flax modules; what a sequence changes is plain state."""

from nestedjax.layers import gates
from nestedjax.layers.attention import Attention, AttentionConfig
from nestedjax.layers.continuum import CMSConfig, ContinuumMemory, InnerConfig
from nestedjax.layers.convolution import CausalConv
from nestedjax.layers.feed_forward import MLP, FeedForward
from nestedjax.layers.layer import Layer
from nestedjax.layers.linear import EMBED_STD, Embed, Linear
from nestedjax.layers.memory_mixer import MemoryMixer
from nestedjax.layers.norm import RMSNorm
from nestedjax.layers.parameters import (
    Sizes,
    grouped,
    head_dim,
    is_param,
    param,
    per_weight,
    residual_scale,
    weight,
    weight_dtype,
)
from nestedjax.layers.self_modifying import self_modifying
from nestedjax.layers.self_modifying_config import MEMORIES, RuleConfig, SelfModifyingConfig
from nestedjax.layers.self_modifying_mixer import self_modifying_mixer

__all__ = [
    "EMBED_STD",
    "MEMORIES",
    "MLP",
    "Attention",
    "AttentionConfig",
    "CMSConfig",
    "CausalConv",
    "ContinuumMemory",
    "Embed",
    "FeedForward",
    "InnerConfig",
    "Layer",
    "Linear",
    "MemoryMixer",
    "RMSNorm",
    "RuleConfig",
    "SelfModifyingConfig",
    "Sizes",
    "gates",
    "grouped",
    "head_dim",
    "is_param",
    "param",
    "per_weight",
    "residual_scale",
    "self_modifying",
    "self_modifying_mixer",
    "weight",
    "weight_dtype",
]
