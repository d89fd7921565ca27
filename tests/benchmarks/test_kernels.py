"""The kernel benchmark: what a row says, and what it refuses."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from nestedjax.benchmarks import against_fla, kernels
from nestedjax.errors import ConfigError
from tests.cli.tiny import command, refused


def test_rows_of_one_workload():
    tiny = kernels._delta_rule("tiny", 1, 2, 8, 4, 4)
    rows = kernels.measure(given=[tiny], repeats=1)
    assert [(r["implementation"], r["direction"]) for r in rows] == [
        (how, direction)
        for how in ("reference", "xla", "pallas_tpu", "pallas_gpu")
        for direction in ("forward", "forward+backward")
    ]
    for row in rows[:4]:
        assert row["refused"] is None and row["milliseconds"] > 0 and row["temp_bytes"] >= 0
        assert row["flops_per_second"] > 0 and row["bytes_per_second"] > 0
        assert row["clock"] == "host" and row["roofline"] is None
    refusals = [f"a {kind} kernel does not run on a cpu" for kind in ("TPU", "GPU")]
    assert [row["refused"] for row in rows[4:]] == [r for r in refusals for _ in range(2)]
    assert len(kernels.table(rows).splitlines()) == 9


def test_every_operation_has_a_workload_for_every_device():
    for scale in ("cpu", "accelerator"):
        names = {workload.op for workload in kernels.workloads(scale)}
        assert names == {"delta_rule", "mlp_memory", "selective_scan", "newton_schulz", "attention"}


def test_mistakes_are_named(capsys):
    assert "no operation 'gather'" in refused(capsys, "bench", "kernels", "--ops", "gather")
    assert "--repeats 0" in refused(capsys, "bench", "kernels", "--repeats", "0")
    code, out, _ = command(capsys, "bench", "kernels", "--ops", "newton_schulz", "--repeats", "1")
    assert code == 0 and "newton_schulz" in out


@pytest.mark.parametrize(
    "make",
    [
        kernels.gated_delta_rule,
        kernels.bfloat16_memory,
        functools.partial(kernels.bfloat16_memory, given=True),
    ],
)
def test_a_workload_that_every_implementation_takes(make):
    """What `--against fla` and a GPU time, at a size that the GPU kernels take."""
    workload = make("tiny", 1, 2, 64, 64)
    arrays = jax.eval_shape(workload.make, jax.random.key(0))
    for name in workload.implementations:
        out = jax.eval_shape(functools.partial(workload.call, implementation=name), arrays)
        assert out.reads.shape == (1, 2, 64, 64) and out.reads.dtype == jnp.bfloat16


def test_against_fla_says_what_it_needs(capsys, monkeypatch):
    arguments = ("bench", "kernels", "--against", "fla")
    for missing, named in ({"torch", "fla"}, "torch flash-linear-attention"), ({"fla"}, "flash"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, m=missing: None if name in m else name
        )
        assert f"pip install {named}" in refused(capsys, *arguments)
    also = refused(capsys, *arguments, "--ops", "delta_rule")
    assert "--ops delta_rule does not go with --against fla" in also
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "needs a GPU, this device is a cpu" in refused(capsys, *arguments)
    with pytest.raises(ConfigError, match="--against fla needs a GPU"):
        against_fla.measure(repeats=1)


def test_table_against_fla():
    row = {"workload": "w", "implementation": "fla", "milliseconds": 2.0, "difference": 1e-3}
    text = against_fla.table([row | {"flops_per_second": 1e12, "ratio": 1.0}])
    assert len(text.splitlines()) == 2 and "1.00" in text
