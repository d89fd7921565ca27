"""What a level is: a pure function with its own state and its own update period."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped
from jaxtyping import PyTree as TreeOf

PyTree = Any
SWITCHES = ("not_written", "frozen", "reset")  # of a memory; see `Level.switched`
# A tree of arrays that share their leading axis, the tokens: of any number T, or of one period P.
PerToken: TypeAlias = TreeOf[Shaped[Array | np.ndarray, "T ..."]]
PerPeriod: TypeAlias = TreeOf[Shaped[Array | np.ndarray, "P ..."]]


class Level(NamedTuple):
    """One level of a nested system.

    A level reads every token and writes its state once a period, at the period's end.

    Attributes:
      name: what the tables and error messages call it.
      period: tokens between two writes; None for a level that is never written in context.
      init: `init(params) -> state`, the state of one sequence at the start of a context.
      step: `step(params, state, x[P, ...]) -> (state, y[P, ...])`, one whole period: causal inside
        it, parallel over its P tokens, its state written once, at its end. With period None any
        length is one step, the state comes back as it was and no token sees another.
      token: optional `token(params, state, pending, x) -> y`, the output for one token in O(1)
        while a period is unfinished; `pending[P, ...]` holds the period's earlier tokens, zeros
        beyond them. Without it `step` runs again on the unfinished period and its write is dropped.
        Where a token sees what earlier ones of its period have written, see `incremental`.
      whole: optional `whole(params, state, x[N * P, ...], begins) -> (state, y)`: N steps in one,
        for a kernel that keeps the state on chip between periods. A period for which `begins`
        (bool[N] or None) is True starts from `init` again.
      advance: how a composition runs its parts, `advance(params, state, x, reset) -> (y, carry)`;
        None for a plain level. Inside `nested` it is also called with `valid=`, the traced number
        of leading tokens of x that count.
      parts: the levels a composition was made of, in the order the data flows through them.
      about: words for the tables of `describe`: any of `objective`, `rule`, `transfer`.
      memories: names of the memories in the state, for a level that can switch them.
      switched: `switched({memory: switch}) -> level`, the same level and parameters with some
        memories "not_written" (the write term is zero; decay and erasure act), "frozen" (they stay
        at their start) or "reset" (back there after every period); None for a level that cannot.
      ndim: how many axes each array of x has, its token axis included: a number for all of them, or
        a tree of numbers like x. `run` refuses another x, such as a batch; None: `run` cannot know.
    """

    name: str
    period: int | None
    init: Callable[[PyTree], PyTree]
    step: Callable[[PyTree, PyTree, PerPeriod], tuple[PyTree, PerPeriod]]
    token: Callable[[PyTree, PyTree, PerPeriod, PyTree], PyTree] | None = None
    whole: (
        Callable[[PyTree, PyTree, PerToken, Bool[Array, " N"] | None], tuple[PyTree, PerToken]]
        | None
    ) = None
    advance: Callable[..., tuple[PerToken, PyTree]] | None = None
    parts: tuple["Level", ...] = ()
    about: Mapping[str, str] | None = None
    ndim: PyTree = None
    memories: tuple[str, ...] = ()
    switched: Callable[[Mapping[str, str]], "Level"] | None = None


def read_write(
    name: str,
    period: int | None,
    *,
    init: Callable[[PyTree], PyTree],
    read: Callable[[PyTree, PyTree, PerToken], PerToken],
    write: Callable[[PyTree, PyTree, PerPeriod], PyTree] | None = None,
    about: Mapping[str, str] | None = None,
    ndim: PyTree = None,
) -> Level:
    """A level that reads with the state of its period's start, then writes once.

    `y[1..P] = read(state, x[1..P])`, `state <- write(state, x[1..P])`: the anchored read of a
    chunk. Because no token of the period sees another, one token is read in O(1) while streaming.

    Args:
      name: what the tables and error messages call it.
      period: tokens between two writes; None for a level that is never written.
      init: `init(params) -> state`.
      read: `read(params, state, x[N, ...]) -> y[N, ...]`, each token by itself, for any N >= 1.
      write: `write(params, state, x[P, ...]) -> state`; None only with `period=None`.
      about: words for the tables of `describe`: any of `objective`, `rule`, `transfer`.
      ndim: axes of each array of x, such as 2 for features [T, d]; see `Level`. Give it, and a
        batch [B, T, d] is refused; without it a batch is read as if B were the tokens.

    Returns:
      The level.

    Raises:
      ValueError: if exactly one of `period` and `write` is None.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import levels
      >>> total = levels.read_write(
      ...     "total", 2,
      ...     init=lambda params: jnp.zeros(()),
      ...     read=lambda params, state, x: jnp.broadcast_to(state, x.shape),
      ...     write=lambda params, state, x: state + params * x.sum(),
      ... )
      >>> y, carry = levels.run(total, 1.0, total.init(1.0), jnp.arange(1.0, 6.0))
      >>> print(y)
      [ 0.  0.  3.  3. 10.]
    """
    if (period is None) != (write is None):
        raise ValueError(
            f"level {name!r}: period={period} and write={write}; a level that is written needs both"
            " a period and a write, a frozen one neither"
        )

    def step(params: PyTree, state: PyTree, x: PerToken) -> tuple[PyTree, PerToken]:
        y = read(params, state, x)
        return (state if write is None else write(params, state, x)), y

    def token(params: PyTree, state: PyTree, pending: PerPeriod, x: PyTree) -> PyTree:
        del pending  # the read is anchored at the period's start
        y = read(params, state, jax.tree.map(lambda leaf: leaf[None], x))
        return jax.tree.map(lambda leaf: leaf[0], y)

    return Level(name, period, init, step, token=token, about=about, ndim=ndim)


def due(position: Int[Array, ""] | int, period: int) -> Bool[Array, ""] | bool:
    """Whether the token at `position`, counted from 0, ends a period: the clock of every write.

    Example:
      >>> from nestedjax import levels
      >>> [levels.due(position, 3) for position in range(6)]
      [False, False, True, False, False, True]
    """
    return (position + 1) % period == 0


def check_switches(
    switches: Mapping[str, str], memories: tuple[str, ...], implementation: str = "xla"
) -> None:
    """Refuse switches that a level does not have.

    Args:
      switches: `{memory: switch}`, as `Level.switched` takes it.
      memories: the names of the level's memories.
      implementation: how the level runs.

    Raises:
      ValueError: an unknown memory or switch.
      NotImplementedError: a kernel.

    Example:
      >>> from nestedjax import levels
      >>> levels.check_switches({"key": "frozen"}, ("key", "value"))
    """
    for name, switch in switches.items():
        if name not in memories or switch not in SWITCHES:
            raise ValueError(
                f"switch {name!r}: {switch!r}; memories are {', '.join(memories)}, and switches"
                f" {', '.join(SWITCHES)}"
            )
    if switches and implementation != "xla":
        raise NotImplementedError(
            f"implementation={implementation!r} has no switches, got {dict(switches)}; use"
            " implementation='xla'"
        )
