"""`nestedjax train`: a run, its folder, its continuation, and what it refuses."""

import json
import re
import shutil

import pytest

from nestedjax.training import read_metrics
from tests.cli.tiny import RUN, TRANSFORMER, command, refused


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_and_its_folder(trained):
    records = read_metrics(trained)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["step"] for r in records if "val_loss" in r] == [6, 12]
    assert records[-1]["val_loss"] < records[0]["loss"]
    assert (trained / "loss.png").stat().st_size > 10_000
    assert list((trained / "tensorboard").iterdir())
    assert sorted(int(p.name) for p in (trained / "checkpoints").iterdir()) == [4, 8, 12]
    config = json.loads((trained / "config.json").read_text())
    assert config["preset"] == "transformer_nano" and config["model"]["attention"]["context"] == 16


def test_the_same_command_on_a_finished_run_says_so_again(copy, text, capsys):
    before = (copy / "metrics.jsonl").read_bytes()
    arguments = [
        "train",
        "transformer_nano",
        "--run",
        copy,
        "--data",
        text,
        *TRANSFORMER,
        *RUN,
    ]
    code, out, _ = command(capsys, *arguments)
    assert code == 0 and (copy / "metrics.jsonl").read_bytes() == before
    last = out.splitlines()[-1]
    assert re.fullmatch(r"done: step=12 val_loss=\d\.\d{4} tokens=768 run=\S+", last)
    assert last.endswith(f"run={copy}")


def test_a_run_may_grow(copy, capsys):
    code, out, _ = command(capsys, "train", "transformer_nano", "--run", copy, "--steps", 14)
    assert code == 0 and out.splitlines()[-1].startswith("done: step=14 ")
    assert [r["step"] for r in read_metrics(copy)] == list(range(1, 15))


def test_a_mesh_trains_the_same_run(trained, text, tmp_path, capsys):
    start = ["train", "transformer_nano", "--run", tmp_path / "mesh", "--data", text]
    settings = [*TRANSFORMER, *RUN]
    code, _, _ = command(capsys, *start, "--mesh", "data=2,fsdp=2,tensor=2", *settings)
    assert code == 0
    one, split = read_metrics(trained), read_metrics(tmp_path / "mesh")
    for name in ("loss", "val_loss"):
        expected = [record[name] for record in one if name in record]
        assert [r[name] for r in split if name in r] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=3", "needs 3 devices and there are 8; data=8 fits"),
        ("data=8", "a microbatch has batch=4.*multiple of 8"),
        ("data=2,tensor=4", "heads=2.*multiple of 4"),
    ],
)
def test_a_mesh_that_does_not_fit(mesh, message, text, tmp_path, capsys):
    start = ["train", "transformer_nano", "--run", tmp_path / "mesh", "--data", text]
    err = refused(capsys, *start, "--mesh", mesh, *TRANSFORMER, *RUN)
    assert re.search(message, err) and not (tmp_path / "mesh").exists()
