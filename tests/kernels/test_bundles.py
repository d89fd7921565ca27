"""The length of every TPU kernel's schedule, so that a slower kernel is noticed without a TPU."""

from importlib import metadata

import pytest

from nestedjax import planning
from nestedjax.benchmarks import tpu_estimates

COMPILER = "0.0.42.1"  # of libtpu: another one schedules in another way
# Bundles written down for v5e: record again where a change is meant.
RECORDED = {
    ("delta_rule", "L4096 d128 gated"): {"forward": 2436, "backward": 4774},
    ("mlp_memory", "one 128-512-128 chunk 128"): {"forward": 13177, "backward": 29703},
    ("selective_scan", "L4096 2048 x 16"): {"forward": 399, "backward": 666},
    ("newton_schulz", "16 x 256 x 256"): {"forward": 4509, "backward": 14861},
}


@pytest.mark.tpu_compile
@pytest.mark.parametrize("case", RECORDED, ids=[op for op, _ in RECORDED])
def test_no_kernel_has_become_slower(case, tmp_path):
    """By no more than a tenth."""
    pytest.importorskip("libtpu", reason="needs the tpu extra: make tpu-compile")
    if (version := metadata.version("libtpu")) != COMPILER:
        pytest.skip(f"recorded with libtpu {COMPILER}, this is {version}")
    index = [(w.op, w.name) for w in tpu_estimates.estimated()].index(case)
    arguments = (str(index), "v5e", "pallas_tpu", "forward+backward")
    row = tpu_estimates.isolated(str(tmp_path), *arguments)
    assert row.get("refused") is None, row
    found = {name: s.bundles for name, s in planning.schedules(tmp_path).items()}
    for direction, recorded in RECORDED[case].items():
        (bundles,) = (n for name, n in found.items() if f"{case[0]}_{direction}" in name)
        assert bundles <= 1.1 * recorded, f"{direction}: {bundles} bundles, {recorded} recorded"
        assert bundles >= 0.7 * recorded, f"faster: record {bundles} for {case}, {direction}"


@pytest.mark.tpu_compile
def test_a_workload_is_judged_by_the_memory_of_its_own_tpu(tmp_path):
    """36 MiB, of which this machine's device, a CPU, is thought to have 14."""
    pytest.importorskip("libtpu", reason="needs the tpu extra: make tpu-compile")
    names = [(w.op, w.name) for w in tpu_estimates.estimated()]
    index = names.index(("newton_schulz", "16 x 1024 x 1024"))
    row = tpu_estimates.isolated(str(tmp_path), str(index), "v5e", "pallas_tpu", "forward")
    assert row.get("refused") is None and row["milliseconds"] > 0, row
