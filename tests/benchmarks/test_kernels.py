"""The kernel benchmark: what a row says, and what it refuses."""

from nestedjax.benchmarks import kernels
from tests.cli.tiny import command, refused


def test_rows_of_one_workload():
    tiny = kernels._delta_rule("tiny", 1, 2, 8, 4, 4)
    rows = kernels.measure(given=[tiny], repeats=1)
    assert [(r["implementation"], r["direction"]) for r in rows] == [
        (how, direction)
        for how in ("reference", "xla", "pallas_tpu")
        for direction in ("forward", "forward+backward")
    ]
    for row in rows[:4]:
        assert row["refused"] is None and row["milliseconds"] > 0 and row["temp_bytes"] >= 0
        assert row["flops_per_second"] > 0 and row["bytes_per_second"] > 0
    assert all(row["refused"] == "a TPU kernel does not run on a cpu" for row in rows[4:])
    assert len(kernels.table(rows).splitlines()) == 7


def test_every_operation_has_a_workload_for_every_device():
    for scale in ("cpu", "accelerator"):
        names = {workload.op for workload in kernels.workloads(scale)}
        assert names == {"delta_rule", "mlp_memory", "selective_scan", "newton_schulz"}


def test_mistakes_are_named(capsys):
    assert "no operation 'attention'" in refused(capsys, "bench", "kernels", "--ops", "attention")
    assert "--repeats 0" in refused(capsys, "bench", "kernels", "--repeats", "0")
    code, out, _ = command(capsys, "bench", "kernels", "--ops", "newton_schulz", "--repeats", "1")
    assert code == 0 and "newton_schulz" in out
