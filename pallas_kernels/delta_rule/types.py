"""The operands and outputs that every implementation of the delta rule shares."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Operands(NamedTuple):
    """Validated operands in the accumulation dtype; a term that is None costs nothing."""

    x: Float[Array, "*x T n"]
    error: Float[Array, "*e T m"]
    rate: Float[Array, "*r T"]
    keep: Float[Array, "*k T"] | None
    erase: Float[Array, "*b T"] | None
    momentum: Float[Array, "*u T"] | None
    initial: Float[Array, "*w m n"]
    initial_momentum: Float[Array, "*w m n"] | None
    queries: Float[Array, "*q T n"] | None


class DeltaOutput(NamedTuple):
    """What a run of the recurrence gives back.

    Attributes:
      reads: [..., T, m], or None without queries.
      final: [..., m, n], the memory after the last token.
      final_momentum: [..., m, n], or None without momentum.
    """

    reads: Float[Array, "... T m"] | None
    final: Float[Array, "... m n"]
    final_momentum: Float[Array, "... m n"] | None
