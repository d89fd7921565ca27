"""Streaming losses: any piece size gives the same, nothing is counted twice."""

import json
import math

import numpy as np
import pytest

from nestedjax.evaluation import Totals, stream_losses


def score(tokens, targets, state):
    """A loss that depends on everything read so far, and on the target."""
    state = state + np.cumsum(tokens, axis=1)[0]
    return (state % 7 + targets[0] / 10)[None], state[-1]


def test_pieces_do_not_matter():
    tokens = np.random.default_rng(0).integers(0, 9, 1000)
    expected = np.cumsum(tokens[:-1]) % 7 + tokens[1:] / 10
    for piece in (1, 7, 512, 999, 5000):
        losses = stream_losses(score, 0, tokens, size_bytes=2000, piece=piece, first_bucket=100)
        assert losses.total.tokens == 999 and math.isclose(losses.total.bytes, 1998)
        assert math.isclose(losses.total.nats, expected.sum())
        assert list(losses.by_position) == [
            (0, 100),
            (100, 200),
            (200, 400),
            (400, 800),
            (800, 1600),
        ]
        for (low, high), totals in losses.by_position.items():
            inside = expected[max(low, 1) - 1 : high - 1]
            assert totals.tokens == inside.size and math.isclose(totals.nats, inside.sum())


def test_units():
    total = Totals(tokens=10, nats=10 * math.log(2), bytes=40)
    assert math.isclose(total.perplexity, 2) and math.isclose(total.bits_per_byte, 0.25)
    both = total.plus(Totals(10, 0.0, 0.0))
    assert math.isclose(both.loss, math.log(2) / 2) and math.isnan(Totals().loss)


def test_figures_that_json_cannot_hold_are_none():
    """Above 700 nats exp(loss) leaves float64; the loss says it all the same."""
    row = Totals(tokens=2, nats=1600.0, bytes=2).row()
    assert row["loss"] == 800 and row["perplexity"] is None and row["bits_per_byte"] > 1000
    for nats in (math.nan, math.inf):
        row = Totals(tokens=2, nats=nats, bytes=2).row()
        assert {row[name] for name in ("loss", "perplexity", "bits_per_byte")} == {None}
    json.loads(json.dumps(row, allow_nan=False))


def test_mistakes():
    with pytest.raises(ValueError, match="1 tokens predicts nothing"):
        stream_losses(score, 0, np.zeros(1, int), size_bytes=1)
