"""`nestedjax bench memory` on a small model, and what it refuses."""

import pytest

from nestedjax.benchmarks import memory
from nestedjax.cli import main
from nestedjax.layers import SelfModifyingConfig
from nestedjax.models import CMSConfig, HopeConfig


def test_a_recomputed_block_keeps_less_than_one_that_is_not():
    small = SelfModifyingConfig(heads=2, head_dim=8, hidden=8, chunk_size=8)
    config = HopeConfig(32, 16, 2, small, CMSConfig((None,), 16))
    rows = memory.measure((64, 256), config=config)
    full, tokens = (row["states_per_chunk"] for row in rows)
    assert 0 < full < tokens
    # two layers, two heads, five memories of two matrices with momentum, float32
    assert rows[0]["state_bytes"] == 2 * 2 * 5 * 4 * 64 * 4
    assert "in states" in memory.table(rows)


@pytest.mark.parametrize("lengths", [("64", "64"), ("64", "100")])
def test_lengths_that_are_not_two_numbers_of_chunks(lengths, capsys):
    assert main(["bench", "memory", "--lengths", *lengths]) == 2
    assert f"--lengths {lengths[0]} {lengths[1]}: give two multiples" in capsys.readouterr().err
