"""Text in and out of the command line: prompts, terminals, pipes, encodings, versions."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from nestedjax import cli, run
from nestedjax.cli.printing import printable
from nestedjax.data import bundled
from nestedjax.version import __version__
from tests.cli.tiny import RUN, TEXT, TRANSFORMER, command, flags, refused

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_no_control_characters_and_a_pipe_gets_all():
    kept = "né\u00a0\u3000日本 \t\n\r\n👩\u200d💻 می\u200cخواهم \u200f\u200e"
    assert printable(kept, Terminal()) == kept
    obeyed = {
        "\x00": r"\x00",
        "\x1b[2J": r"\x1b[2J",
        "a\rb": r"a\rb",
        "\x7f": r"\x7f",
        "\x9b1m": r"\x9b1m",
        "\x85": r"\x85",
        "\u202e": r"\u202e",
        "\u2066": r"\u2066",
    }
    for text, shown in obeyed.items():
        assert printable(text, Terminal()) == shown
        assert printable(text, io.StringIO()) == text


def program(*arguments, stdin=None, **environment):
    """The command line in a process of its own: exit code, bytes of standard output, and error."""
    done = subprocess.run(
        [sys.executable, "-m", "nestedjax", *map(str, arguments)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr.decode()


def test_the_module_is_the_command_line_and_says_its_version(capsys):
    assert program("--version") == (0, f"nestedjax {__version__}\n".encode(), "")
    code, out, _ = command(capsys, "--help")
    assert code == 0 and "--version" in out and "--version" not in cli.COMMANDS


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_of_standard_output_ends_a_command(trained, encoding):
    prompt = "né€\u00a0\r\x1b[2J"
    arguments = ("generate", trained, "--tokens", 1, "--temperature", 0, "--prompt", prompt)
    code, out, err = program(*arguments, PYTHONIOENCODING=encoding)
    assert code == 0 and "Traceback" not in err
    assert out.startswith(prompt.encode(encoding, errors="backslashreplace"))


def test_a_prompt_from_a_file_or_standard_input(trained, tmp_path, capsys, monkeypatch):
    def text(*arguments):
        greedy = ("--tokens", 5, "--temperature", 0)
        code, out, _ = command(capsys, "generate", trained, *greedy, *arguments)
        assert code == 0
        return out

    prompt = "To be,\nor — not\n" * 30  # several pieces
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + prompt.encode())
    (tmp_path / "p16.txt").write_text(prompt, encoding="utf-16")
    expected = text("--prompt", prompt)
    assert text("--prompt-file", tmp_path / "p.txt") == expected
    assert text("--prompt-file", tmp_path / "p16.txt") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert text("--prompt-file", "-") == expected


def test_prompts_that_cannot_be_read(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe")
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    for arguments, says in (
        (["--prompt-file", tmp_path / "no.txt"], f"file not found: {tmp_path}/no.txt; check"),
        (["--prompt-file", tmp_path / "empty.txt"], "empty.txt is empty; give a prompt"),
        (["--prompt-file", tmp_path / "binary.txt"], "binary.txt is not UTF-8 at byte 2; convert"),
        (["--prompt-file", tmp_path / "nul.txt"], "nul.txt holds NUL bytes, as no text does"),
        (["--prompt-file", tmp_path / "a.zip"], "a.zip is a zip archive; unpack it"),
        (["--prompt-file", tmp_path], f"cannot read {tmp_path} (Is a directory)"),
        (["--prompt-file", ""], "the name of a file is empty; name a file or folder"),
        (["--prompt", "a", "--prompt-file", "-"], "are two prompts; give one of them"),
        (["--prompt", "ab\udcff"], "the prompt is not UTF-8 at character 2; convert it"),
    ):
        assert says in refused(capsys, "generate", trained, *arguments)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    says = refused(capsys, "generate", trained, "--prompt-file", "-")
    assert "standard input is empty; give a prompt" in says


@pytest.fixture(scope="module")
def without_newlines(tmp_path_factory, text):
    """A run whose tokenizer spm_train made with its defaults: they normalise new lines away."""
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(bundled()), model_prefix=str(folder / "small"), vocab_size=400,
        input_sentence_size=2000, shuffle_input_sentence=False, minloglevel=2,
    )  # fmt: skip
    model = folder / "small.model"
    sampled = flags(*TRANSFORMER, *RUN, "--steps", "2", "--sample-every", "2")
    arguments = ["--run", folder / "run", "--data", text, "--tokenizer", model, *sampled]
    assert cli.main(["train", "transformer_nano", *map(str, arguments)]) == 0
    return folder / "run"


def test_a_tokenizer_without_new_lines(without_newlines, capsys):
    tokenizer = run.load(without_newlines).tokenizer
    assert not tokenizer.encode("\n").size and run.default_prompt(tokenizer) == "."
    code, out, _ = command(capsys, "generate", without_newlines, "--tokens", 5)
    assert code == 0 and out.startswith(".")
    line = refused(capsys, "generate", without_newlines, "--prompt", "\n")
    assert r"the prompt '\n' has no token in this tokenizer" in line


def test_prompt_and_continuation_are_decoded_together(without_newlines):
    from nestedjax.run.prompt import continuation

    tokenizer = run.load(without_newlines).tokenizer
    for whole, prompt in (("ROMEO: where are", "ROMEO:"), ("where are", "where"), ("the", "t")):
        ids, first = tokenizer.encode(whole), tokenizer.encode(prompt)
        if (ids[: first.size] == first).all():
            assert prompt + continuation(tokenizer, first, ids[first.size :]) == whole
    ids = tokenizer.encode("ROMEO: where")
    assert continuation(tokenizer, ids[:-1], ids[-1:]) == " where"


def test_characters_of_several_tokens_are_whole_at_the_seam():
    from nestedjax.data import ByteTokenizer
    from nestedjax.run.prompt import continuation

    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("né€😀")
    assert continuation(tokenizer, ids[:3], ids[3:]) == "€😀"
    assert continuation(tokenizer, ids[:1], ids[1:]) == "é€😀"


def test_a_tokenizer_that_was_replaced_is_refused(without_newlines, tmp_path, capsys):
    copy = shutil.copytree(without_newlines, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    other = tmp_path / "other.model"
    sentencepiece.SentencePieceTrainer.Train(
        input=str(bundled()), model_prefix=str(other.with_suffix("")), vocab_size=300,
        input_sentence_size=1000, shuffle_input_sentence=False, minloglevel=2,
    )  # fmt: skip
    config["data"]["tokenizer"] = str(other)
    (copy / "config.json").write_text(json.dumps(config))
    for name in ("generate", "eval"):
        line = refused(capsys, name, copy)
        assert f"{other} is not the tokenizer that this run was trained with" in line


def test_evaluation_says_why_its_loss_is_not_that_of_training(trained, tmp_path, capsys):
    says = (
        "val_loss in training is another number: the first 2 batches of the valid split, 4 rows of"
        " 16 tokens each, every row a fresh context. Here each document is one context"
    )
    _, out, _ = command(capsys, "eval", trained)
    assert says in out
    _, out, _ = command(capsys, "eval", trained, "--json")
    assert says in json.loads(out)["note"]
    (tmp_path / "a.txt").write_text(TEXT[:500])
    _, out, _ = command(capsys, "eval", trained, "--json", "--data", tmp_path / "a.txt")
    assert "note" not in json.loads(out)


def test_held_out_text_that_changed_is_not_evaluated_in_silence(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    book = tmp_path / "book.txt"
    book.write_text("another text\n" + TEXT)
    config["data"]["files"] = [str(book)]
    (copy / "config.json").write_text(json.dumps(config))
    assert "the run's text is not what it was trained on" in refused(capsys, "eval", copy)


def test_what_is_left_out_of_the_data_is_said_once(trained, tmp_path, capsys):
    for name in ("a.txt", ".b.txt", "c.jpg"):
        (tmp_path / name).write_text(TEXT[:500])
    code, _, err = command(capsys, "eval", trained, "--data", tmp_path)
    says = f"left out of folder {tmp_path}: 1 not text (c.jpg), 1 hidden (.b.txt)"
    assert code == 0 and err.count("\n") == 1 and f"nestedjax eval: warning: {says}" in err
    sizes = flags(*TRANSFORMER, *RUN, "--steps", "1")
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "b.jpg"):
        (tmp_path / "data" / name).write_text(TEXT)
    arguments = ("--run", tmp_path / "run", "--data", tmp_path / "data", *sizes)
    code, _, err = command(capsys, "train", "transformer_nano", *arguments)
    assert code == 0 and err.count("left out of folder") == 1


@pytest.mark.parametrize("name", ["generate", "eval", "levels"])
def test_configurations_that_are_damaged(trained, tmp_path, capsys, name):
    copy = shutil.copytree(trained, tmp_path / "run")
    whole = json.loads((copy / "config.json").read_text())
    model = whole["model"]
    for damaged in (
        "{",
        "[]",
        '"run"',
        {**whole, "layout": "2"},
        {**whole, "model": {**model, "width": "16"}},
        {**whole, "model": {**model, "type": "os:path"}},
        {**whole, "model": {**model, "type": 3}},
        {**whole, "model": []},
    ):
        text = damaged if isinstance(damaged, str) else json.dumps(damaged)
        (copy / "config.json").write_text(text)
        assert "config.json" in refused(capsys, name, copy)


def test_empty_names(trained, capsys):
    for arguments, says in (
        (["eval", trained, "--data", ""], "files=''"),
        (["train", "hope_nano", "--data", ""], "files=''"),
        (["train", "hope_nano", "--tokenizer", ""], "tokenizer=''"),
        (["train", "hope_nano", "--run", ""], "--run '': is empty"),
        (["eval", ""], "folder is ''"),
        (["generate", ""], "folder is ''"),
    ):
        assert says in refused(capsys, *arguments)


def test_a_checkpoint_that_training_removes_while_it_is_read(trained, tmp_path, monkeypatch):
    from nestedjax.checkpoint import CheckpointError, Checkpoints

    copy = shutil.copytree(trained, tmp_path / "run")
    steps, plain = copy / "checkpoints", Checkpoints.restore

    def late(self, *arguments, **options):
        monkeypatch.setattr(Checkpoints, "restore", plain)
        for old in ("4", "8"):
            shutil.rmtree(steps / old)
        raise CheckpointError("no checkpoint is whole")

    monkeypatch.setattr(Checkpoints, "restore", late)
    assert run.load(copy).step == 12
