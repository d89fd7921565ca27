"""What a switch costs, against sums over the rows written out."""

import json
import math

import numpy as np
import pytest

from nestedjax.evaluation import Blocks, GateReach, Moved, block_losses, rows_of, use

RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 9, n) for n in (37, 1, 20, 8)]


def score(tokens, targets):
    return np.cumsum(tokens, axis=1) + targets / 10


@pytest.mark.parametrize("length", [1, 7, 50])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_every_token_but_the_first_of_a_text_is_predicted_once(length, batch):
    rows = rows_of(TEXTS, length)
    assert rows.tokens_of.sum() == sum(t.size - 1 for t in TEXTS)
    found = block_losses(score, rows, batch=batch)
    expected, counts = [], []
    for text in TEXTS:
        for first in range(0, text.size - 1, length):
            inputs = text[first : min(first + length, text.size - 1)]
            targets = text[first + 1 : first + 1 + inputs.size]
            expected.append((np.cumsum(inputs) + targets / 10).sum())
            counts.append(inputs.size)
    np.testing.assert_allclose(found.nats, expected)
    np.testing.assert_array_equal(found.tokens, counts)
    assert math.isclose(found.loss, sum(expected) / sum(counts))


def test_delta_and_standard_error():
    plain = Blocks(np.full(30, 8.0), RNG.normal(10, 2, 30))
    other = plain._replace(nats=plain.nats + RNG.normal(1, 0.5, 30))
    found = use("memory", "frozen", plain, other)
    each = (other.nats - plain.nats) / 8
    assert math.isclose(found.delta, each.mean())
    assert math.isclose(found.delta, found.loss - plain.loss, rel_tol=1e-9)
    assert math.isclose(found.standard_error, each.std(ddof=1) / math.sqrt(30))
    one = use("memory", "frozen", Blocks(np.ones(1), np.ones(1)), Blocks(np.ones(1), np.ones(1)))
    assert math.isnan(one.standard_error) and one.delta == 0


def test_rows_of_any_length_count_by_their_tokens():
    """The error of a ratio: by the jackknife, which is close to it for many rows."""
    tokens = RNG.integers(1, 9, 400).astype(float)
    plain = Blocks(tokens, np.zeros(400))
    cost = tokens * RNG.normal(0.5, 0.2, 400)
    found = use("memory", "frozen", plain, plain._replace(nats=cost))
    assert math.isclose(found.delta, cost.sum() / tokens.sum())
    left = (cost.sum() - cost) / (tokens.sum() - tokens)
    jackknife = math.sqrt(399 / 400 * np.sum((left - left.mean()) ** 2))
    assert math.isclose(found.standard_error, jackknife, rel_tol=0.02)


def test_rows_that_json_can_hold():
    one = Blocks(np.ones(1), np.ones(1))
    rows = [
        use("a", "frozen", one, one),
        GateReach("a", "decay", 0.5, 0.75, math.inf),
        Moved("a", math.nan),
    ]
    found = json.loads(json.dumps([row.row() for row in rows], allow_nan=False))
    assert found[0] == {
        **{"name": "a", "switch": "frozen", "loss": 1.0},
        **{"delta": 0.0, "standard_error": None},
    }
    assert found[1]["most"] is None and found[2] == {"name": "a", "movement": None}
