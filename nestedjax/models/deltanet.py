"""DeltaNet: a linear memory written by the delta rule (spec F)."""

import dataclasses

from flax import nnx

from nestedjax import memory
from nestedjax.fields import Taps
from nestedjax.layers import MemoryMixer, gates
from nestedjax.models.presets import linear_presets
from nestedjax.models.recurrent import RecurrentConfig


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(RecurrentConfig):
    """DeltaNet (Yang et al., arXiv 2406.06484): `M <- M (I - b k k^T) + b v k^T`, `o = M q`.

    Departures: (1) convolutions begin as the identity; (2) as many features a head as the sizes
    of this package have.

    Attributes:
      conv: width in tokens of the convolution on queries, keys and values; 0 for none.
    """

    conv: Taps = 4

    def mixer(self, wide: int, *, rngs: nnx.Rngs) -> MemoryMixer:
        """Unit keys and queries, a learning rate in (0, 1) for every token and head."""
        level = memory.delta_net(
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
            rngs=rngs,
        )


linear_presets("deltanet", DeltaNetConfig)
