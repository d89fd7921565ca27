"""RetNet: a linear memory that decays at a fixed rate in every head (spec F)."""

import dataclasses

from flax import nnx

from nestedjax import memory
from nestedjax.fields import RotaryBase
from nestedjax.layers import MemoryMixer, gates
from nestedjax.models.presets import linear_presets
from nestedjax.models.recurrent import RecurrentConfig


@dataclasses.dataclass(frozen=True)
class RetNetConfig(RecurrentConfig):
    """RetNet (Sun et al., arXiv 2307.08621): `M <- g M + v k^T`, `g = 1 - 2^(-5-h)` in head h.

    Departures: (1) rotary positions without xPos' scale; (2) RMSNorm of each head for GroupNorm;
    (3) values are as wide as keys (published: twice); (4) a SwiGLU network for a GELU one.

    Attributes:
      rotary_base: base of the rotary positions of queries and keys.
    """

    rotary_base: RotaryBase = 1e4

    def mixer(self, wide: int, *, rngs: nnx.Rngs) -> MemoryMixer:
        """Rotated queries and keys, a constant decay for each head, a gated output."""
        level = memory.retention_memory(
            wide, wide, chunk_size=self.chunk_size, implementation=self.implementation
        )
        return MemoryMixer(
            self,
            level,
            heads=self.heads,
            key_dim=wide,
            keys=gates.scaled(wide**-0.5),
            rotary_base=self.rotary_base,
            learning_rate=gates.constant(1.0),
            decay=gates.constant([1.0 - 2.0 ** (-5 - head) for head in range(self.heads)]),
            output=gates.gated_norm(),
            rngs=rngs,
        )


linear_presets("retnet", RetNetConfig)
