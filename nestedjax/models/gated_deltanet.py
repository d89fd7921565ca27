"""Gated DeltaNet: the delta rule on a memory that decays (spec F)."""

import dataclasses

from flax import nnx

from nestedjax import memory
from nestedjax.fields import Taps
from nestedjax.layers import MemoryMixer, gates
from nestedjax.models.presets import linear_presets
from nestedjax.models.recurrent import RecurrentConfig


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(RecurrentConfig):
    """Gated DeltaNet (Yang et al., arXiv 2412.06464): `M <- a M (I - b k k^T) + b v k^T`.

    Departures: (1) convolutions begin as the identity; (2) values are as wide as keys (published:
    twice), heads as wide as the sizes of this package have them.

    Attributes:
      conv: width in tokens of the convolution on queries, keys and values; 0 for none.
    """

    conv: Taps = 4

    def mixer(self, wide: int, *, rngs: nnx.Rngs) -> MemoryMixer:
        """DeltaNet's with a decay for every token and head, and a gated output."""
        level = memory.gated_delta_net(
            wide, wide, chunk_size=self.chunk_size, implementation=self.implementation
        )
        return MemoryMixer(
            self,
            level,
            heads=self.heads,
            key_dim=wide,
            queries=gates.unit_silu,
            keys=gates.unit_silu,
            values=gates.silu,
            conv=self.conv,
            learning_rate=gates.sigmoid(),
            decay=gates.exponential_decay(),
            output=gates.gated_norm(),
            rngs=rngs,
        )


linear_presets("gated_deltanet", GatedDeltaNetConfig)
