"""The loss of texts of any length, streamed through a state of constant size."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

PyTree = Any
Score = Callable[[np.ndarray, np.ndarray, PyTree], tuple[Any, PyTree]]


class Totals(NamedTuple):
    """Loss summed over tokens; totals add up with `plus`.

    Attributes:
      tokens: predicted tokens.
      nats: the sum of their losses.
      bytes: of the text that these tokens encode.
    """

    tokens: int = 0
    nats: float = 0.0
    bytes: float = 0.0

    def plus(self, other: "Totals") -> "Totals":
        """The sum of both."""
        tokens, nats = self.tokens + other.tokens, self.nats + other.nats
        return Totals(tokens, nats, self.bytes + other.bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite from 700 nats on."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits for each byte of text, whatever the vocabulary."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def row(self) -> dict[str, float | int | None]:
        """The figures as values that JSON can hold: None for what is not finite."""
        figures = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }
        return {
            "tokens": self.tokens,
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},
        }


class Losses(NamedTuple):
    """The losses of a text that was streamed.

    Attributes:
      total: over all its tokens.
      by_position: (first, one past the last) position of the predicted token -> totals; buckets
        double in size: [0, F), [F, 2F), [2F, 4F) ...
    """

    total: Totals
    by_position: dict[tuple[int, int], Totals]

    def plus(self, other: "Losses") -> "Losses":
        """The sum of both, bucket by bucket."""
        buckets = dict(self.by_position)
        for bucket, totals in other.by_position.items():
            buckets[bucket] = buckets.get(bucket, Totals()).plus(totals)
        return Losses(self.total.plus(other.total), dict(sorted(buckets.items())))


def stream_losses(
    score: Score,
    state: PyTree,
    tokens: np.ndarray,
    *,
    size_bytes: int,
    piece: int = 512,
    first_bucket: int = 256,
) -> Losses:
    """The loss of every token of one text but its first, in one context from beginning to end.

    Memory does not grow with the text: pieces of it pass through `score` one after another.

    Args:
      score: `score(tokens[1, T], targets[1, T], state) -> (losses[1, T], state)`, compiled once
        because T is always `piece`; the loss in nats.
      state: at the start of a context.
      tokens: integer[N], N >= 2.
      size_bytes: bytes of the text.
      piece: tokens fed at once.
      first_bucket: positions of the first bucket.

    Returns:
      `Losses`; position p is the number of tokens that a token had before it.

    Raises:
      ValueError: the text has fewer than two tokens, or `piece` or `first_bucket` is below 1.

    Example:
      >>> import numpy as np
      >>> def score(tokens, targets, state):
      ...     return np.ones(targets.shape), state
      >>> losses = stream_losses(score, None, np.arange(11), size_bytes=11, first_bucket=4)
      >>> losses.total.loss, {k: t.tokens for k, t in losses.by_position.items()}
      (1.0, {(0, 4): 3, (4, 8): 4, (8, 16): 3})
    """
    if tokens.size < 2:
        raise ValueError(f"a text of {tokens.size} tokens predicts nothing; give at least two")
    if piece < 1 or first_bucket < 1:
        raise ValueError(f"piece={piece} and first_bucket={first_bucket} must be at least 1")
    rate = size_bytes / tokens.size
    result = Losses(Totals(), {})
    for start in range(0, tokens.size - 1, piece):
        count = min(piece, tokens.size - 1 - start)
        window = np.zeros(piece + 1, np.int32)
        window[: count + 1] = tokens[start : start + count + 1]
        losses, state = score(window[None, :-1], window[None, 1:], state)
        found = np.asarray(losses, np.float64)[0, :count]
        result = result.plus(_tally(found, start + 1, rate, first_bucket))
    return result


def _tally(losses: np.ndarray, start: int, rate: float, first: int) -> Losses:
    """Losses of the tokens at positions `start`, `start + 1`, ... as totals."""
    parts = {}
    for low, high in _buckets(start, start + losses.size, first):
        inside = losses[max(low - start, 0) : high - start]
        parts[low, high] = Totals(inside.size, float(inside.sum()), inside.size * rate)
    total = Totals(losses.size, float(losses.sum()), losses.size * rate)
    return Losses(total, parts)


def _buckets(start: int, stop: int, first: int) -> Iterable[tuple[int, int]]:
    low, high = 0, first
    while low < stop:
        if high > start:
            yield low, high
        low, high = high, high * 2
