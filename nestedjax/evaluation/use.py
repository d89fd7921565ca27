"""What a model relies on: how much loss the same text has with a part of it switched off."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from nestedjax.evaluation.perplexity import PyTree, Score, pieces


class Blocks(NamedTuple):
    """The loss of a text by blocks of it.

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
        return {n: _finite(v) if isinstance(v, float) else v for n, v in self._asdict().items()}


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
        return {n: _finite(v) if isinstance(v, float) else v for n, v in self._asdict().items()}


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
        return {"name": self.name, "movement": _finite(self.movement)}


def block_losses(
    score: Score, state: PyTree, texts: Iterable[np.ndarray], *, piece: int = 512
) -> Blocks:
    """The loss of texts in blocks of `piece` tokens, each text one context.

    Args:
      score: as in `stream_losses`.
      state: at the start of a context.
      texts: integer[N] each, N >= 2.
      piece: tokens of a block; the last of each text may have fewer.
    """
    found = [
        (losses.size, float(losses.sum()))
        for tokens in texts
        for _, losses in pieces(score, state, tokens, piece)
    ]
    tokens, nats = np.array(found, np.float64).reshape(-1, 2).T
    return Blocks(tokens, nats)


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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
