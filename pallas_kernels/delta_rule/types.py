"""The operands and outputs that every implementation of the delta rule shares."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Operands(NamedTuple):
    """Validated operands in the accumulation dtype, tokens last; None costs nothing.

    `anchored` is `initial @ x` where the caller has it already.
    """

    x: Float[Array, "*x n T"]
    error: Float[Array, "*e m T"]
    learning_rate: Float[Array, "*r T"]
    initial: Float[Array, "*w m n"]
    decay: Float[Array, "*k T"] | None = None
    erase: Float[Array, "*b T"] | None = None
    momentum: Float[Array, "*u T"] | None = None
    initial_momentum: Float[Array, "*w m n"] | None = None
    queries: Float[Array, "*q n T"] | None = None
    anchored: Float[Array, "*a m T"] | None = None


class DeltaOutput(NamedTuple):
    """What a run of the recurrence gives back.

    Attributes:
      reads: [..., T, m] ([..., m, T] where tokens come last), or None without queries.
      final: [..., m, n], the memory after the last token.
      final_momentum: [..., m, n], or None without momentum.
    """

    reads: Float[Array, "..."] | None
    final: Float[Array, "... m n"]
    final_momentum: Float[Array, "... m n"] | None
