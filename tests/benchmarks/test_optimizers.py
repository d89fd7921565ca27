"""`nestedjax bench optimizers` on the smallest preset: rows, table, file, refusals."""

import json

import jax

from nestedjax.cli import main


def test_rows_are_relative_to_adamw(tmp_path, capsys):
    path = tmp_path / "rows.json"
    command = ["bench", "optimizers", "--names", "dgd", "--preset", "transformer_nano"]
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int power
        assert main([*command, "--batch", "1", "--length", "16", "--json", str(path)]) == 0
    base, row = json.loads(path.read_text())
    assert (base["optimizer"], row["optimizer"]) == ("adamw", "dgd")
    assert base["step_ratio"] == base["state_ratio"] == 1 and row["step_seconds"] > 0
    assert base["state_bytes"] > 8 * base["parameters"] > row["state_bytes"]
    assert "| dgd |" in capsys.readouterr().out


def test_an_unknown_optimizer_is_named(capsys):
    assert main(["bench", "optimizers", "--names", "nobody"]) == 2
    assert "no optimizer 'nobody'" in capsys.readouterr().err
