"""Sizes and switches of the models: frozen dataclasses, and the presets built from them."""

import dataclasses
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float64"]
Remat = Literal["none", "full", "dots"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Sliding-window attention.

    Attributes:
      heads: heads; each has width / heads features.
      context: tokens that a token sees, itself included; the cache holds as many.
      theta: base of the rotary frequencies.
      qk_norm: RMS-normalise queries and keys per head.
      conv: width of a causal convolution on the input, or 0.
    """

    heads: int
    context: int
    theta: float = 1e4
    qk_norm: bool = False
    conv: int = 0


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Transformer++ (spec F1).

    Attributes:
      vocab: tokens in the vocabulary.
      width: features of the residual stream (d).
      layers: blocks.
      hidden: width of the SwiGLU network.
      attention: its heads and window.
      dtype: what activations are computed in; weights are kept in at least float32.
      remat: what the backward pass recomputes.
    """

    vocab: int
    width: int
    layers: int
    hidden: int
    attention: AttentionConfig
    dtype: Dtype = "float32"
    remat: Remat = "none"
