"""Linear attention: a linear memory that adds every pair up (spec F)."""

import dataclasses

from flax import nnx

from nestedjax import memory
from nestedjax.layers import MemoryMixer, gates
from nestedjax.models.presets import linear_presets
from nestedjax.models.recurrent import RecurrentConfig


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(RecurrentConfig):
    """Linear attention (Katharopoulos et al., arXiv 2006.16236): `o = M f(q) / (z . f(q))`.

    `M <- M + v f(k)^T`, `z <- z + f(k)`, `f(x) = elu(x) + 1`. The reads are normalised by z and not
    by a norm of their own; positions are not encoded, as published.
    """

    def mixer(self, wide: int, *, rngs: nnx.Rngs) -> MemoryMixer:
        """Positive keys and queries, and one more row in the memory for z."""
        level = memory.normalised_linear_attention(
            wide,
            wide,
            chunk_size=self.chunk_size,
            feature_map=gates.elu_plus_one,
            implementation=self.implementation,
        )
        return MemoryMixer(
            self,
            level,
            heads=self.heads,
            key_dim=wide,
            learning_rate=gates.constant(1.0),
            output=gates.plain(),
            start=gates.empty(rows=wide + 1),
            rngs=rngs,
        )


linear_presets("linear_attention", LinearAttentionConfig)
