"""Estimates for TPUs: what a row says, and what is refused."""

import importlib.util

import pytest

from nestedjax.benchmarks import tpu_estimates
from tests.cli.tiny import refused


def test_what_is_missing_is_named(capsys, monkeypatch):
    arguments = ("bench", "kernels", "--tpu-estimates")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'nestedjax[tpu]'" in refused(capsys, *arguments)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "no estimates for 'v9'; v5e, v5p, v6e" in refused(capsys, *arguments, "v9")
    both = refused(capsys, "bench", "kernels", "--against", "fla", *arguments[2:])
    assert "--against and --tpu-estimates are two benchmarks" in both


@pytest.mark.parametrize("answer", [{"milliseconds": 1.0, "flops_per_second": 1e9}, None])
def test_rows_have_the_benchmarks_keys(monkeypatch, answer):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    answer = tpu_estimates._refused("no VMEM") if answer is None else answer
    monkeypatch.setattr(tpu_estimates, "isolated", lambda *arguments: dict(answer))
    rows = list(tpu_estimates.measure(["v5e"], ops=["selective_scan"]))
    assert [(row["implementation"], row["direction"]) for row in rows] == [
        (how, direction)
        for how in ("xla", "pallas_tpu")
        for direction in ("forward", "forward+backward")
    ]
    assert rows[0]["device"] == "TPU v5 lite" and rows[0]["clock"] == "estimate"
    assert rows[0]["refused"] == answer.get("refused")
