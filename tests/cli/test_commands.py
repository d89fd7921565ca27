"""`--help`, `eval`, `generate` and `levels`."""

import json
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax import cli, models, run
from nestedjax.training import read_metrics
from tests.cli.tiny import HOPE_ATTENTION, RUN, TEXT, command, flags


def test_help_costs_less_than_half_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys; from nestedjax.cli import main; sys.exit(main(['--help']))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert all(f"  {name} " in out.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_with_an_example(name, capsys):
    code, out, _ = command(capsys, name, "--help")
    assert code == 0 and f"example:\n  nestedjax {name} " in out


def test_help_names_the_presets(capsys):
    _, out, _ = command(capsys, "train", "--help")
    assert not {*models.PRESETS} - {*out.replace(",", " ").split()}


def test_eval_streams_each_document_as_one_context(trained, tmp_path, capsys):
    first, second = TEXT[:700], TEXT[700:1000]
    (tmp_path / "a.txt").write_text(first)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": second}) + "\n")
    paths = tmp_path / "a.txt", tmp_path / "b.jsonl"
    code, out, _ = command(capsys, "eval", trained, "--json", "--data", *paths)
    found = json.loads(out)
    model = run.load(trained).model
    nats = []
    for text in (first, second):
        tokens = jnp.asarray(np.frombuffer(text.encode(), np.uint8).astype(np.int32))[None]
        logits, _ = model(tokens[:, :-1])
        log_p = logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))
        nats.append(-np.take_along_axis(np.asarray(log_p), np.asarray(tokens)[:, 1:, None], 2))
    assert code == 0 and found["step"] == 12
    assert [row["tokens"] for row in found["files"]] == [699, 299]
    for row, values in zip(found["files"], nats, strict=True):
        np.testing.assert_allclose(row["loss"], values.mean(), rtol=1e-5)
        np.testing.assert_allclose(row["bits_per_byte"], values.mean() / np.log(2), rtol=1e-5)
        np.testing.assert_allclose(row["perplexity"], np.exp(values.mean()), rtol=1e-5)
    bounds = [(row["first"], row["stop"], row["tokens"]) for row in found["positions"]]
    assert bounds == [(0, 256, 510), (256, 512, 300), (512, 1024, 188)]
    early = np.concatenate([values[0, :255] for values in nats])
    np.testing.assert_allclose(found["positions"][0]["loss"], early.mean(), rtol=1e-5)
    assert found["all"]["tokens"] == 998


def test_eval_without_data_takes_the_held_out_parts(trained, capsys):
    code, out, _ = command(capsys, "eval", trained)
    assert code == 0 and "valid split" in out and "test split" in out and "0-255" in out


def test_generate(trained, capsys):
    def text(*arguments):
        code, out, _ = command(capsys, "generate", trained, "--tokens", 40, *arguments)
        assert code == 0
        return out.removesuffix("\n")

    first = text("--prompt", "To be", "--seed", 1)
    assert first.startswith("To be") and len(first) == 45
    assert text("--prompt", "To be", "--seed", 1) == first
    assert text("--prompt", "To be", "--seed", 2) != first
    greedy = text("--prompt", "To be", "--temperature", 0)
    assert greedy == text("--prompt", "To be", "--top-k", 1, "--seed", 5)


@pytest.fixture(scope="module")
def continuum(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("runs") / "continuum"
    arguments = ["train", "hope_attention_nano", "--run", str(folder), "--data", str(text)]
    assert cli.main([*arguments, *flags(*HOPE_ATTENTION, *RUN, "--steps", "4")]) == 0
    return folder


def test_adapting_changes_what_is_said(continuum, capsys):
    prompt = "To be, or not to be, that is the question."

    def text(*arguments):
        greedy = ("--tokens", 30, "--temperature", 0, "--prompt", prompt)
        code, out, err = command(capsys, "generate", continuum, *greedy, *arguments)
        assert code == 0
        return out, err

    plain, _ = text()
    still, told = text("--adapt", "--periods", 8, 16, "--inner-learning-rate", 0)
    assert still == plain and told.endswith("writes of its blocks 5 of 8 tokens, 2 of 16 tokens\n")
    assert text("--adapt", "--periods", 8, 16, "--inner-learning-rate", 5)[0] != plain


def test_adapting_refuses(continuum, trained, capsys):
    for folder, arguments, says in (
        (continuum, ["--adapt"], "the prompt has 1 tokens, too few to learn from in chunks of 64"),
        (continuum, ["--adapt", "--periods", "8"], "the model has 2 blocks"),
        (
            continuum,
            ["--adapt", "--periods", 8, "x"],
            "--periods x: expected a whole number or no",
        ),
        (continuum, ["--periods", 8, 16], "--periods and --inner-learning-rate need --adapt"),
        (trained, ["--adapt"], "no continuum memory"),
    ):
        code, _, err = command(capsys, "generate", folder, *arguments)
        assert code == 2 and says in err and err.count("\n") == 1, err


def test_generate_refuses(trained, capsys):
    for arguments, says in (
        (["--tokens", 0], "tokens=0 must be at least 1"),
        (["--top-k", 0], "top_k=0 must be at least 1"),
        (["--temperature", -1], "temperature=-1.0 must be 0 or more"),
        (["--prompt", ""], "the prompt is empty"),
    ):
        code, _, err = command(capsys, "generate", trained, *arguments)
        assert code == 2 and says in err and err.count("\n") == 1


def test_levels(trained, tmp_path, capsys):
    code, out, _ = command(capsys, "levels", "hope_nano")
    assert code == 0 and out.startswith("level 1 of ")
    lines = [line for line in out.splitlines() if line.startswith("    ")]
    picture = tmp_path / "levels.png"
    code, out, _ = command(capsys, "levels", "hope_nano", "--json", "--plot", picture)
    boxes = json.loads(out)
    assert picture.read_bytes()[:4] == b"\x89PNG" and len(boxes) == len(lines)
    frequencies = [1 / box["period"] if box["period"] else 0 for box in boxes]
    assert frequencies == sorted(frequencies)
    assert {"matrix first moment", "rest second moment", "memory", "key memory"} <= {
        b["name"] for b in boxes
    }
    slow = sum(box["parameters"] for box in boxes if box["rule"] == "optimizer")
    assert slow == models.parameter_count(run.build(run.run_preset("hope_nano")).model)
    code, out, _ = command(capsys, "levels", trained, "--json")
    found = {box["name"]: box for box in json.loads(out)}
    assert code == 0 and found["first moment"]["period"] == 64  # 4 rows of 16 tokens


def test_the_validation_loss_printed_is_the_one_recorded(trained):
    assert read_metrics(trained)[-1]["val_loss"] < 5.5
