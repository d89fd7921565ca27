"""`nestedjax eval --use`: its table, picture and JSON; `nestedjax train --without-writes`."""

import json
import shutil

import pytest

import nestedjax as nj
from nestedjax.cli import main
from tests.cli.tiny import HOPE, RUN, TEXT, command, flags, refused


@pytest.fixture(scope="module")
def hope(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("runs") / "hope"
    settings = flags(*HOPE, *RUN, "--steps", "2", "--validate-every", "2")
    assert main(["train", "hope_nano", "--run", str(folder), "--data", str(text), *settings]) == 0
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(TEXT[:200])
    return path


def test_table_picture_and_json(hope, short, capsys):
    code, out, err = command(capsys, "eval", hope, "--use", "--data", short)
    assert code == 0 and err == ""
    lines = out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("use ")) :]
    assert max(map(len, table[:-1])) <= 80
    code, out, _ = command(capsys, "eval", hope, "--use", "--json", "--data", short)
    found = json.loads(out)
    assert code == 0 and {*found} >= {"use", "gates", "starts", "unswitched", "all"}
    rows = {(row["name"], row["switch"]): row for row in found["use"]}
    assert ("projections", "frozen") in rows and ("memories", "not_written") in rows
    for (name, switch), row in rows.items():
        assert any(
            line.split()[:2] == [name, switch] and f"{row['delta']:+.5f}" in line for line in table
        ), (name, switch)
        assert abs(row["loss"] - row["delta"] - found["unswitched"]) < 1e-9
    assert table[-1] == f"picture: {hope}/use.png"
    assert (hope / "use.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_with_nothing_to_switch(trained, short, capsys):
    code, out, _ = command(capsys, "eval", trained, "--use", "--data", short)
    assert code == 0 and "nothing to switch: no memory, continuum block or convolution" in out
    assert "picture" not in out
    code, out, _ = command(capsys, "eval", trained, "--use", "--json", "--data", short)
    assert code == 0 and json.loads(out)["use"] == []


def test_a_picture_that_cannot_be_written_costs_a_warning(hope, short, tmp_path, capsys):
    shutil.copytree(hope, tmp_path / "run")
    (tmp_path / "run" / "use.png").unlink(missing_ok=True)
    (tmp_path / "run" / "use.png").mkdir()
    (tmp_path / "run" / "use.png" / "a").touch()
    code, out, err = command(capsys, "eval", tmp_path / "run", "--use", "--data", short)
    assert code == 0 and "no picture in" in err and "picture:" not in out


def test_without_writes(tmp_path, text, capsys):
    settings = flags(*HOPE, *RUN, "--steps", "2", "--validate-every", "2")
    where = ("--run", tmp_path / "run", "--data", text)
    code, _, err = command(capsys, "train", "hope_nano", *where, *settings, "--without-writes")
    assert code == 0, err
    assert nj.load(tmp_path / "run").run.model.writes is False
    code, _, _ = command(capsys, "train", "--run", tmp_path / "run", "--steps", 3)
    assert code == 0 and nj.load(tmp_path / "run").step == 3
    assert "writes" in refused(capsys, "train", "--run", tmp_path / "run", "--writes")
    line = refused(capsys, "train", "transformer_nano", "--without-writes")
    assert "a TransformerConfig has no memory that is written in context" in line
    code, out, _ = command(capsys, "train", "hope_nano", "--help")
    assert code == 0 and "--without-writes" in out


def test_training_says_what_the_memories_were_worth(hope, trained, capsys):
    """The lines are the rows of `evaluate`; a model without memories says so."""
    found = nj.evaluate(nj.load(hope), use=[("memories", "not_written"), ("projections", "frozen")])
    code, out, _ = command(capsys, "train", "--run", hope, "--use")
    assert code == 0
    first = f"memories: loss of the validation and test text {found.unswitched:.4f}"
    lines = out.splitlines()
    at = lines.index(first)
    for line, row in zip(lines[at + 1 : at + 3], found.use, strict=True):
        assert f"{row.loss:.4f} ({row.delta:+.4f} +- {row.standard_error:.4f})" in line
    assert "nothing written" in lines[at + 1] and lines[-1].startswith("done: ")
    code, out, _ = command(capsys, "train", "--run", trained, "--use")
    assert code == 0 and "memories: this model has none that are written in context" in out
    code, out, _ = command(capsys, "train", "--run", trained)
    assert code == 0 and "memories:" not in out
