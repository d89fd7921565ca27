"""Sizes and switches of the models: frozen dataclasses, and the presets built from them."""

import dataclasses
from typing import Literal

from nestedjax.mixers.self_modifying import SelfModifyingConfig

Dtype = Literal["float32", "bfloat16", "float64"]
Remat = Literal["none", "tokens", "full", "dots"]


def _choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")


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
      remat: what the backward pass recomputes; see `blocks.scan_blocks`.
    """

    vocab: int
    width: int
    layers: int
    hidden: int
    attention: AttentionConfig
    dtype: Dtype = "float32"
    remat: Remat = "none"


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """How a continuum memory learns inside one context, by the model's own next-token loss.

    Attributes:
      learning_rate: of every block at the start; what multiplies it is learned per block and layer.
      optimizer: "sgd", "momentum" or "adamw" (bias-corrected, b2 0.95).
      momentum: decay of "momentum" and of the first moment of "adamw".
      weight_decay: of "adamw".
      clip: largest global norm of a block's gradient, over its layers; None does not clip.
      reduction: "mean" or "sum" over the tokens of a period.
      second_order: whether the outer gradient goes through the inner one (MAML) or takes it as a
        constant (first-order MAML).
    """

    learning_rate: float = 0.1
    optimizer: Literal["sgd", "momentum", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    second_order: bool = True

    def __post_init__(self):
        _choose("optimizer", self.optimizer, ("sgd", "momentum", "adamw"))
        _choose("reduction", self.reduction, ("mean", "sum"))
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"weight_decay={self.weight_decay} is of optimizer='adamw', got {self.optimizer!r}"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip={self.clip} must be positive, or None for no clipping")


@dataclasses.dataclass(frozen=True)
class CMSConfig:
    """A continuum memory system.

    Attributes:
      periods: tokens between two writes of each block, fast first; None for a block that is never
        written in context and stepped with everything else in training. Tokens of the training
        stream in lifetime "stream", of the sequence in lifetime "in_context".
      hidden: hidden width of each block.
      form: "sequential", "headwise" or "nested" (sequential; the start of each block is a parameter
        of the next slower one, from which it begins again whenever that one steps).
      mlp: "gelu" or "swiglu".
      lifetime: "stream" (the blocks are outer parameters, stepped at their periods) or
        "in_context" (each sequence has its own, started from learned weights).
      inner: how the blocks learn in lifetime "in_context".
      start: how the starts of form "nested" move: "fomaml", "reptile" or "frozen".
    """

    periods: tuple[int | None, ...]
    hidden: int
    form: Literal["sequential", "headwise", "nested"] = "sequential"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    lifetime: Literal["stream", "in_context"] = "stream"
    inner: InnerConfig = InnerConfig()
    start: Literal["fomaml", "reptile", "frozen"] = "fomaml"

    def __post_init__(self):
        if not self.periods:
            raise ValueError("periods=(): a continuum memory needs at least one block")
        if any(period is not None and period < 1 for period in self.periods):
            raise ValueError(f"periods={self.periods}: each must be None or at least 1 token")
        timed = self.timed
        for fast, slow in zip(timed, timed[1:], strict=False):
            if slow % fast:
                raise ValueError(
                    f"periods={self.periods}: {fast} does not divide {slow}; list the fast blocks"
                    " first, each period a multiple of the one before"
                )
        _choose("form", self.form, ("sequential", "headwise", "nested"))
        _choose("lifetime", self.lifetime, ("stream", "in_context"))
        _choose("start", self.start, ("fomaml", "reptile", "frozen"))
        if self.start != "fomaml" and self.form != "nested":
            raise ValueError(f"start={self.start!r} is of form='nested', got form={self.form!r}")
        if self.lifetime == "in_context" and not timed:
            raise ValueError(
                f"periods={self.periods} write nothing in context: give a block a period in tokens,"
                " or use lifetime='stream'"
            )
        if self.form == "nested" and len(timed) < 2:
            raise ValueError(
                f"periods={self.periods}: form='nested' needs two blocks with a period; use"
                " form='sequential'"
            )

    @property
    def timed(self) -> tuple[int, ...]:
        """The periods of the blocks that have one, fast first."""
        return tuple(period for period in self.periods if period is not None)


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
      remat: what the backward pass recomputes besides each chunk; see `blocks.scan_blocks`.
      implementation: how the self-modifying memory runs: "xla", a scan over chunks, or
        "pallas_tpu", one kernel each way for all chunks of a call (TPU only).
    """

    vocab: int
    width: int
    layers: int
    memory: SelfModifyingConfig
    cms: CMSConfig
    literal: bool = False
    dtype: Dtype = "float32"
    remat: Remat = "none"
    implementation: Literal["xla", "pallas_tpu"] = "xla"

    def __post_init__(self):
        _choose("implementation", self.implementation, ("xla", "pallas_tpu"))
        if self.implementation != "xla" and len(set(self.memory.chunk_sizes)) == 2:
            raise ValueError(
                f"implementation={self.implementation!r} takes one chunk size, got chunk_size="
                f"{self.memory.chunk_size} and projection_chunk_size="
                f"{self.memory.projection_chunk_size}; set them alike, or implementation='xla'"
            )


@dataclasses.dataclass(frozen=True)
class HopeAttentionConfig:
    """HOPE-Attention: softmax attention in place of the self-modifying memory (spec E).

    Attributes:
      vocab: tokens in the vocabulary.
      width: features of the residual stream (d).
      layers: blocks.
      attention: its heads and window.
      cms: the continuum memory.
      dtype: what activations are computed in; weights and memories are at least float32.
      remat: what the backward pass recomputes.
    """

    vocab: int
    width: int
    layers: int
    attention: AttentionConfig
    cms: CMSConfig
    dtype: Dtype = "float32"
    remat: Remat = "none"
