"""`nestedjax bench peers` at toy length: rows, table, file, refusals."""

import json

import pytest

from nestedjax.benchmarks import peers
from nestedjax.cli import main


def test_a_row_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--models", "transformer", "--steps", "2", "--length", "32", "--batch", "2"]
    assert main(["bench", "peers", *arguments, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())
    assert row["model"] == "transformer" and row["length"] == 32 and row["batch"] == 2
    assert row["tokens_per_cpu_second"] > 0 and len(row["cpu_seconds"]) == 2
    assert row["peak_rss_mb"] >= row["compile_rss_mb"] > 50 and row["parameters"] > 3e6
    assert row["allocator"] in ("kept", "user", "not glibc")
    assert "transformer" in capsys.readouterr().out


def test_a_row_that_fails_says_why():
    with pytest.raises(RuntimeError, match="nobody at length 8 failed: .*nobody"):
        peers.isolated(peers.Workload("nobody", 8, 1, 1), core=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nobody"], "no model 'nobody'"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--core", "4096"], "--core 4096 is not one of"),
    ],
)
def test_bad_arguments_say_what(arguments, message, capsys):
    assert main(["bench", "peers", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_model_has_its_size():
    configurations = peers.configurations()
    assert set(configurations) == set(peers.MODELS)
    for config in configurations.values():
        assert (config.vocab, config.width, config.layers) == (512, 256, 4)
