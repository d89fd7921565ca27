"""What every architecture's configuration has: sizes, and how its blocks are built."""

import dataclasses
import math
from typing import Annotated, Any, Literal

from flax import nnx

from nestedjax.fields import Count, Range, check_fields
from nestedjax.layers import EMBED_STD, CMSConfig
from nestedjax.models.block import Block

Dtype = Literal["float32", "bfloat16", "float64"]
Remat = Literal["none", "tokens", "full", "dots"]
Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a language model; an architecture is a subclass with a `block`.

    A subclass is a frozen dataclass whose docstring describes its own settings in an "Attributes"
    section; it works in every command and function as soon as its module is imported.

    Attributes:
      vocab: tokens in the vocabulary.
      width: features of the residual stream (d).
      layers: blocks.
      dtype: what activations are computed in; weights and memories are kept in at least float32.
      remat: what the backward pass recomputes: "none", "tokens" (each block's feed-forward network
        from its input, and what a mixer does to tokens apart from its products with slow weights),
        "full" (all but the blocks' inputs) or "dots" (as "full", but matrix products are kept).
      implementation: how memories run over the whole chunks of a call: "xla" (a scan over chunks),
        "pallas_tpu" or "pallas_gpu" (one kernel each way, on such a device only).
      writes: whether memories are written in context. Without, every memory stays at its start,
        which is learned (learning rate 0, decay 1), and no block of a continuum memory learns in
        context: the model to compare with, to see what memory pays. Were erasure to act, it would
        say which tokens were there, and that can be enough (experiments/LOG.md).
      embedding_std: standard deviation of the token embedding, which is the head, at the start;
        the first logits do not depend on it. At 0.02 a step of an optimizer like Adam moves it
        fifty times as far, relatively, as at 1: better on text and worse on recall and bAbI
        (experiments/LOG.md).
    """

    vocab: Count
    width: Count
    layers: Count
    dtype: Dtype = dataclasses.field(default="float32", kw_only=True)
    remat: Remat = dataclasses.field(default="none", kw_only=True)
    implementation: Implementation = dataclasses.field(default="xla", kw_only=True)
    writes: bool = dataclasses.field(default=True, kw_only=True)
    embedding_std: Annotated[float, Range(1e-3, 10)] = dataclasses.field(
        default=EMBED_STD, kw_only=True
    )

    def __post_init__(self):
        check_fields(self)
        if self.layers % self.pattern:
            raise ValueError(
                f"layers={self.layers} is not a multiple of the pattern of {self.pattern} blocks"
            )
        if self.implementation != "xla" and not self.chunks:
            raise ValueError(
                f"implementation={self.implementation!r} is how memories run, and a"
                f" {type(self).__name__} has none; leave it out"
            )
        if not self.writes:
            self._check_without_writes()

    def _check_without_writes(self) -> None:
        """Refuse a model that writes nothing anyway, or writes in a kernel."""
        cms = self.continuum
        if not self.chunks and (cms is None or cms.lifetime != "in_context"):
            raise ValueError(
                f"writes=False: a {type(self).__name__} has no memory that is written in context;"
                " leave it out"
            )
        if self.implementation != "xla":
            raise ValueError(
                f"writes=False: implementation={self.implementation!r} has no switches; use"
                " implementation='xla'"
            )

    def block(self, *, rngs: nnx.Rngs) -> Block | tuple[Block, ...]:
        """One block, or the blocks of a pattern that the model repeats.

        Args:
          rngs: where the weights are drawn.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how a block is built")

    @property
    def pattern(self) -> int:
        """How many blocks `block` returns; the model repeats them until it has `layers`."""
        return 1

    @property
    def chunks(self) -> tuple[int, ...]:
        """Tokens between two writes of each in-context memory; () for a model without any."""
        return ()

    @property
    def continuum(self) -> CMSConfig | None:
        """The continuum memory of the blocks, or None."""
        return None

    def with_continuum(self, cms: CMSConfig) -> "ModelConfig":
        """The same configuration with another continuum memory.

        Raises:
          ValueError: the architecture has none.
        """
        names = [
            f.name for f in dataclasses.fields(self) if getattr(self, f.name) is self.continuum
        ]
        if self.continuum is None or not names:
            raise ValueError(f"{type(self).__name__} has no continuum memory to change")
        changes: dict[str, Any] = {names[0]: cms}
        return dataclasses.replace(self, **changes)

    @property
    def period(self) -> int:
        """The common in-context period in tokens: documents begin on multiples of it; 1 if none."""
        cms = self.continuum
        own = cms.timed[:1] if cms is not None and cms.lifetime == "in_context" else ()
        return math.lcm(1, *self.chunks, *own)
