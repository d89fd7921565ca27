"""What a level is: a pure function with its own state and its own update period."""

from collections.abc import Callable
from typing import Any, NamedTuple

PyTree = Any


class Level(NamedTuple):
    """One level of a nested system.

    A level reads every token and writes its state once a period, at the period's end.

    Attributes:
      name: what the tables and error messages call it.
      period: tokens between two writes; None for a level that is never written in context.
      init: `init(params) -> state`, the state of one sequence at the start of a context.
      step: `step(params, state, x[P, ...]) -> (state, y[P, ...])`, one whole period: causal inside
        it, parallel over its P tokens, its state written once, at its end. With period None any
        length P is one step and the state comes back as it was.
      token: optional `token(params, state, pending, x) -> y`, the output for one token in O(1)
        while a period is unfinished; `pending` holds the period's tokens so far. Without it
        `step` runs again on the unfinished period and its write is dropped.
      advance: how a composition streams its parts; None for a plain level.
      parts: the levels a composition was made of.
    """

    name: str
    period: int | None
    init: Callable[..., PyTree]
    step: Callable[..., tuple[PyTree, PyTree]]
    token: Callable[..., PyTree] | None = None
    advance: Callable[..., tuple[PyTree, PyTree]] | None = None
    parts: tuple["Level", ...] = ()
