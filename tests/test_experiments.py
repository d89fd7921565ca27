"""Experiments: each says what it claims and how to run it, starts from the root, and continues."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from nestedjax.data import bundled
from nestedjax.training import read_metrics

ROOT = Path(__file__).parents[1]
# What is started with `python -m`; the other files of the folder are parts of these.
NAMES = sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if "__main__" in p.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_head_says_claim_command_and_hardware(name):
    module = importlib.import_module(f"experiments.{name}")
    for word in ("Claim", "Command:", "Hardware:", f"python -m experiments.{name}"):
        assert word in module.__doc__, word


def test_an_experiment_starts_with_python_m():
    command = [sys.executable, "-m", "experiments.language_modeling", "--help"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert "--scale {smoke,cpu,gpu}" in out


@pytest.mark.slow
def test_language_modeling_continues_each_of_its_runs(tmp_path):
    from experiments import language_modeling as lm

    text = bundled().read_text()
    for part, piece in (("train", text[:60_000]), ("heldout", text[-30_000:])):
        (tmp_path / part).mkdir()
        (tmp_path / part / "novel.txt").write_text(piece)
    scale = lm.SCALES["smoke"]
    rows = lm.compare(scale, ["transformer"], data=tmp_path, out=tmp_path / "out")
    assert [step for step, _ in rows[0]["curve"]] == list(range(1, 7))
    (folder,) = (tmp_path / "out").iterdir()
    before = (folder / "metrics.jsonl").read_bytes()
    again = lm.compare(scale, ["transformer"], data=tmp_path, out=tmp_path / "out")
    assert (folder / "metrics.jsonl").read_bytes() == before and len(read_metrics(folder)) == 6
    assert again[0]["loss"] == rows[0]["loss"]
    lm.draw(rows, tmp_path / "lm.png")
    assert "| transformer | " in lm.report(rows) and (tmp_path / "lm.png").stat().st_size > 5000
