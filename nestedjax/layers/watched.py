"""What a mixer keeps where its gates are watched."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax.levels import Level


class Watched(NamedTuple):
    """A level that makes gates of its own, and says which.

    Attributes:
      level: the mixer's level with outputs `(reads, {gate: [T, H]})`.
      gates: their names.
    """

    level: Level
    gates: tuple[str, ...]


class GateRange(NamedTuple):
    """How far a gate went over the tokens of a context.

    Attributes:
      least: the smallest value, [batch, heads].
      total: the sum.
      most: the largest.
      tokens: how many.
    """

    least: Float[Array, "*b H"]
    total: Float[Array, "*b H"]
    most: Float[Array, "*b H"]
    tokens: Float[Array, "*b H"]

    @classmethod
    def start(cls, batch: int, heads: int) -> "GateRange":
        """That of no tokens."""
        zero = jnp.zeros((batch, heads), jnp.float32)
        return cls(zero + jnp.inf, zero, zero - jnp.inf, zero)

    def plus(self, gate: Float[Array, "B T H"]) -> "GateRange":
        """With more tokens."""
        gate = gate.astype(self.total.dtype)
        return GateRange(
            jnp.minimum(self.least, gate.min(1)),
            self.total + gate.sum(1),
            jnp.maximum(self.most, gate.max(1)),
            self.tokens + gate.shape[1],
        )
