"""Sizes and switches of the models: frozen dataclasses, and the presets built from them."""

import dataclasses
from typing import Literal

from nestedjax.mixers.self_modifying import SelfModifyingConfig

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


@dataclasses.dataclass(frozen=True)
class CMSConfig:
    """A continuum memory system.

    Attributes:
      periods: tokens of the training stream between two writes of each block, fast first; None for
        a block that is stepped with everything else.
      hidden: hidden width of each block.
      form: "sequential" or "headwise".
      mlp: "gelu" or "swiglu".
    """

    periods: tuple[int | None, ...]
    hidden: int
    form: Literal["sequential", "headwise"] = "sequential"
    mlp: Literal["gelu", "swiglu"] = "gelu"

    def __post_init__(self):
        if not self.periods:
            raise ValueError("periods=(): a continuum memory needs at least one block")
        timed = [period for period in self.periods if period is not None]
        for fast, slow in zip(timed, timed[1:], strict=False):
            if slow % fast:
                raise ValueError(
                    f"periods={self.periods}: {fast} does not divide {slow}; list the fast blocks"
                    " first, each period a multiple of the one before"
                )
        if self.form not in ("sequential", "headwise"):
            raise ValueError(f"form={self.form!r} is not one of sequential, headwise")


@dataclasses.dataclass(frozen=True)
class HopeConfig:
    """HOPE (spec E).

    Attributes:
      vocab: tokens in the vocabulary.
      width: features of the residual stream (d).
      layers: blocks.
      memory: the self-modifying memory.
      cms: the continuum memory.
      literal: the printed form: nothing projected but the query, no gate, o added to x.
      dtype: what activations are computed in; weights and memories are at least float32.
      remat: what the backward pass recomputes besides each chunk.
    """

    vocab: int
    width: int
    layers: int
    memory: SelfModifyingConfig
    cms: CMSConfig
    literal: bool = False
    dtype: Dtype = "float32"
    remat: Remat = "none"
