"""What a model relies on: how much loss the same text has with a part of it switched off."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Texts cut into rows, each a context of its own; what is left at a text's end is padded.

    Attributes:
      tokens: int32[rows, length].
      targets: int32[rows, length], the tokens that follow.
      tokens_of: int[rows], how many tokens of a row count.
    """

    tokens: np.ndarray
    targets: np.ndarray
    tokens_of: np.ndarray


class Blocks(NamedTuple):
    """The loss of texts by blocks of them.

    Attributes:
      tokens: predicted tokens of each block, float64[blocks].
      nats: the sum of their losses, float64[blocks].
    """

    tokens: np.ndarray
    nats: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())


class Use(NamedTuple):
    """What one switch costs.

    Attributes:
      name: of the part of the model.
      switch: how it is switched; see `nestedjax.models.switch`.
      loss: with the switch, in nats per token.
      delta: `loss` less the loss of the model as it is.
      standard_error: of `delta`, over the blocks of the text; NaN if there is only one.
    """

    name: str
    switch: str
    loss: float
    delta: float
    standard_error: float

    def row(self) -> dict[str, str | float | None]:
        """The figures as values that JSON can hold: None for what is not finite."""
        return _values(self)


class GateReach(NamedTuple):
    """How far a gate of the memories goes on a text, over its tokens, all heads and layers.

    Attributes:
      name: of the memory's level.
      gate: "learning_rate", "decay", ...
      least: the smallest value.
      mean: over tokens, heads and layers.
      most: the largest value.
    """

    name: str
    gate: str
    least: float
    mean: float
    most: float

    def row(self) -> dict[str, str | float | None]:
        """As `Use.row`."""
        return _values(self)


class Moved(NamedTuple):
    """How far training has moved the weights that a memory begins from.

    Attributes:
      name: of the memory.
      movement: `|now - drawn| / |drawn|`, over all its weights in all layers; NaN where it was
        drawn as zeros.
    """

    name: str
    movement: float

    def row(self) -> dict[str, str | float | None]:
        """As `Use.row`."""
        return _values(self)


def rows_of(texts: Sequence[np.ndarray], length: int) -> Rows:
    """Texts as rows of `length` tokens; every token but a text's first is predicted once.

    Args:
      texts: integer[N] each; those with less than two tokens give no row.
      length: tokens of a row.

    Example:
      >>> import numpy as np
      >>> from nestedjax.evaluation import rows_of
      >>> rows_of([np.arange(6)], 3).targets.tolist(), rows_of([np.arange(6)], 3).tokens_of.tolist()
      ([[1, 2, 3], [4, 5, 0]], [3, 2])
    """
    inputs, targets, counts = [], [], []
    for text in texts:
        for first in range(0, text.size - 1, length):
            count = min(length, text.size - 1 - first)
            row = np.zeros((2, length), np.int32)
            row[0, :count] = text[first : first + count]
            row[1, :count] = text[first + 1 : first + count + 1]
            inputs.append(row[0])
            targets.append(row[1])
            counts.append(count)
    shape = (len(counts), length)
    return Rows(
        np.array(inputs, np.int32).reshape(shape),
        np.array(targets, np.int32).reshape(shape),
        np.array(counts, np.int64),
    )


def block_losses(
    score: Callable[[np.ndarray, np.ndarray], Any], rows: Rows, *, batch: int = 8
) -> Blocks:
    """The loss of each row.

    Args:
      score: `score(tokens[B, T], targets[B, T]) -> losses[B, T]`, each row a fresh context.
      rows: from `rows_of`.
      batch: rows that are scored at once.
    """
    nats = np.zeros(len(rows.tokens_of))
    for first in range(0, len(nats), batch):
        here = slice(first, first + batch)
        missing = max(first + batch - len(nats), 0)  # one shape for all batches
        tokens, targets = (
            np.pad(a[here], ((0, missing), (0, 0))) for a in (rows.tokens, rows.targets)
        )
        losses = np.asarray(score(tokens, targets), np.float64)[: batch - missing]
        counted = np.arange(losses.shape[1])[None, :] < rows.tokens_of[here, None]
        nats[here] = np.where(counted, losses, 0.0).sum(1)
    return Blocks(rows.tokens_of.astype(np.float64), nats)


def use(name: str, switch: str, plain: Blocks, switched: Blocks) -> Use:
    """What a switch costs, from the losses of the same blocks without it and with it.

    The delta is the ratio of two sums over blocks, of nats and of tokens; its standard error is
    that of a ratio: `sqrt(B / (B - 1) sum_b (d_b - delta n_b)^2) / sum_b n_b`, with d_b the nats
    that the switch costs in block b of n_b tokens. With blocks of one size it is the standard
    deviation of their deltas over sqrt(B).

    Args:
      name: of the part.
      switch: how it is switched.
      plain: losses of the model as it is.
      switched: with the switch, block by block the same text.

    Example:
      >>> import numpy as np
      >>> from nestedjax.evaluation import Blocks, use
      >>> plain = Blocks(np.array([4.0, 4.0]), np.array([4.0, 8.0]))
      >>> found = use("memory", "frozen", plain, plain._replace(nats=np.array([8.0, 10.0])))
      >>> found.loss, found.delta, found.standard_error
      (2.25, 0.75, 0.25)
    """
    cost, tokens, count = switched.nats - plain.nats, plain.tokens, plain.tokens.size
    delta = float(cost.sum() / tokens.sum())
    error = math.nan
    if count > 1:
        spread = float(np.sum((cost - delta * tokens) ** 2))
        error = math.sqrt(count / (count - 1) * spread) / float(tokens.sum())
    return Use(name, switch, switched.loss, delta, error)


def _values(row: Use | GateReach | Moved) -> dict[str, str | float | None]:
    return {
        n: v if isinstance(v, str) or math.isfinite(v) else None for n, v in row._asdict().items()
    }
