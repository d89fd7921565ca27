"""The table of the menu of writes, and what is measured of one row."""

import pytest

from experiments import memory_norms, rules
from nestedjax.layers import SelfModifyingConfig


@pytest.mark.parametrize("name", rules.BASES)
def test_every_row_is_another_memory(name):
    rows = rules.menu(rules.base(name))
    assert len(set(rows.values())) == len(rows) > 20
    for words, memory in rows.items():
        where, choice = (words.split(", ")[0].split(" ", 1) + [""])[:2]
        if where in rules.MENU:
            held = getattr(memory.rule if where in rules.OF_RULE else memory, where)
            assert ("+".join(held) if isinstance(held, tuple) else str(held)) == choice


def test_the_published_base_is_the_published_write():
    sizes = {"heads": 2, "head_dim": 16, "hidden": 16, "chunk_size": 32}
    assert rules.base(rules.PUBLISHED) == SelfModifyingConfig(**sizes)


def test_a_rule_is_measured_until_it_is_not_finite():
    memory = rules.base("hope_linear_nano", heads=1, head_dim=8)
    found = memory_norms.measure_rule(
        memory_norms.one_layer("hope_linear_nano", memory), length=1024, seed=0
    )
    assert found["finite"] == 1024 and 0.1 < found["queried"][0] < found["queried"][1] < 5
    away = rules.changed(memory, objective="l2")
    found = memory_norms.measure_rule(
        memory_norms.one_layer("hope_linear_nano", away), length=1024, seed=0
    )
    assert found["finite"] < 1024 or found["queried"][1] > 1e3
