"""Bad input: one line that says what to do, exit code 2, and nothing lost."""

import gc
import json
import shutil
import signal
import warnings
from pathlib import Path

import pytest

import nestedjax as nj
from nestedjax.cli import main
from tests.cli.tiny import RUN, TRANSFORMER, command, flags, refused

TRAIN = ("train", "transformer_nano", "--run")


def tree(folder):
    """Every file of a folder and its bytes."""
    return {
        p.relative_to(folder): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "tensorboard" not in p.parts
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "no command 'trian'; did you mean train?"),
        (["train"], "PRESET is missing"),
        (["eval"], "RUN is missing"),
        (["bench", "peer"], "no benchmark 'peer'; did you mean peers?"),
        (["eval", "a", "b"], "unexpected b"),
        (["train", "hope_nan"], "no preset 'hope_nan'; did you mean hope_nano"),
        (["train", "hope_nano", "--color"], "no flag --color; --help lists all of them"),
        (["train", "hope_nano", "--data", "no.txt"], "file not found: {here}/no.txt"),
        (["train", "hope_nano", "--data", "empty.txt"], "file is empty: {here}/empty.txt"),
        (["train", "hope_nano", "--data", "folder"], "no text in folder {here}/folder"),
        (["train", "hope_nano", "--tokenizer", "no.model"], "tokenizer file not found"),
        (["train", "hope_nano", "--run="], "--run '': is empty; name one"),
        (["train", "hope_nano", "--run", ""], "--run '': is empty; name one"),
        (["eval", "--run", "x"], "no flag --run; --help lists all of them"),
        (["generate", "x", "--tokens", "2.5"], "--tokens 2.5: expected a whole number"),
        (["generate", "x", "--periods", "x"], "--periods x: expected a whole number or none"),
        (["levels", "hope_nano", "--plot", ""], "--plot '': is empty; name a .png file"),
        (["levels", "hope_nano", "--import", ""], "no module '' to import"),
        (["train", "--lr", "1", "hope_nano"], "no flag --lr; did you mean --learning-rate?"),
        (["train", "hope_nano", "--run", "empty.txt"], "is a file, not a run folder"),
        (["train", "hope_nano", "--run", "empty.txt/run"], "cannot"),
        (["train", "hope_nano", "--run", "folder"], "holds photo.jpg but no run"),
        (["eval", "nowhere"], "no run in nowhere; make one with nestedjax train"),
        (["generate", "nowhere"], "no run in nowhere"),
        (["levels", "hope_nan"], "neither a preset nor a run folder; did you mean hope_nano"),
        (["levels", "hope_nano", "--plot", "no/where.png"], "cannot write no/where.png"),
    ],
)
def test_names_and_files(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.jpg").touch()
    line = refused(capsys, *arguments)
    assert says.format(here=tmp_path) in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "folder"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("--step 5", "no flag --step; did you mean --steps"),
        ("--memory.chunksize 4", "no flag --memory.chunksize; did you mean --memory.chunk-size"),
        ("--xyz 4", "no flag --xyz; --help lists all of them"),
        ("--set steps=5", "no flag --set"),
        ("--steps", "--steps needs a value"),
        ("--steps 5 --steps 6", "--steps is said twice"),
        ("--steps many", "--steps many: expected a whole number"),
        ("--clip big", "--clip big: expected a number or none"),
        ("--cms.periods 4 x", "--cms.periods x: expected a whole number or none"),
        ("--dtype float8", "--dtype float8: expected one of float32, bfloat16, float64"),
        ("--optimizer.cache maybe", "unexpected maybe"),
        ("--steps 0", "steps=0 must be at least 1"),
        ("--learning-rate -1", "learning_rate=-1.0 must be more than 0"),
        ("--seed -1", "seed=-1 must be at least 0"),
        ("--length 4", "length=4 is shorter than a chunk of 32 tokens"),
        ("--length 80", "length=80 is not a multiple of the chunk of 32 tokens; use length=64"),
        ("--microbatches 3", "microbatches=3 does not divide batch=8"),
        ("--lr 1", "no flag --lr; did you mean --learning-rate?"),
        ("--bs 1", "no flag --bs; did you mean --batch?"),
        ("--wd 1", "no flag --wd; did you mean --weight-decay?"),
        ("--layers=", "--layers '': expected a whole number"),
        ("--width 1e3", "--width 1e3: expected a whole number"),
        ("--steps 2.7", "--steps 2.7: expected a whole number"),
        ("--sample-every 2.5", "--sample-every 2.5: expected a whole number or none"),
        ("--config=", "--config '': is empty; name one"),
        ("--data", "--data needs a value"),
        ("--cms.periods --steps 3", "--cms.periods needs a value"),
        ("--literal --no-literal", "--no-literal is said twice, or its opposite is"),
        ("-- --steps 3", "unexpected --; leave it out"),
        ("--seed 4294967296", "must be at most 4294967295"),
        ("--clip nan", "clip=nan must be a finite number, more than 0, or none"),
        ("--memory.max-learning-rate nan", "memory.max_learning_rate=nan must be a finite number"),
        ("--memory.rule.inner-clip 0", "memory.rule.inner_clip=0.0 must be more than 0, or none"),
        ("--cms.inner.learning-rate 1e9", "must be at most 1000"),
        ("--cms.hidden 0", "cms.hidden=0 must be at least 1"),
        ("--mesh data=0", "data=0: the size of a mesh axis is a positive integer"),
        ("--batch 16", "set cms.periods to 4096 4096 8192 16384, or change batch or length"),
        ("--dtype float64", "set JAX_ENABLE_X64=1, or use dtype=float32"),
        ("--implementation triton", "expected one of xla, pallas_tpu, pallas_gpu"),
        ("--remat all", "expected one of none, tokens, full, dots"),
        ("--cms.periods 100 250", "100 does not divide 250"),
        ("--cms.periods 3000 6000", "of the 2048 tokens in one step (batch x length); set cms.per"),
        ("--memory.rule.objective magic", "expected one of l2, dot, delta"),
        ("--vocab 100", "vocab=100 is less than the tokenizer's 256 tokens"),
        ("--width 7 --literal", "the literal form needs heads * head_dim = width"),
        ("--config no.json", "no.json is no run configuration"),
        ("--import no_such", "no module 'no_such' to import"),
    ],
)
def test_settings(settings, says, tmp_path, capsys):
    line = refused(capsys, "train", "hope_nano", "--run", tmp_path / "run", *settings.split())
    assert says in line
    assert not (tmp_path / "run").exists()


def test_a_text_too_short(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("To be, or not to be")
    run = tmp_path / "run"
    line = refused(capsys, "train", "hope_nano", "--run", run, "--data", tmp_path / "short.txt")
    assert "the train split has 17 tokens, fewer than length=256" in line and not run.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--width", 8], "width was 16 when this run began, and cannot become 8"),
        (["--learning-rate", 1], "learning_rate was 0.01"),
        (["--steps", 11], "steps=11 is less than the run's 12; steps may only grow"),
        (["--data", "other.txt"], "the data is not what this run was saved with: text was"),
    ],
)
def test_another_run_in_its_folder(arguments, says, trained, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    before = tree(copy)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("another text " * 1000)
    code, _, err = command(capsys, *TRAIN, copy, *arguments)
    assert code == 2 and err.count("\n") == 1 and says in err
    assert tree(copy) == before
    if arguments[0] == "--width":
        line = refused(capsys, "train", "hope_nano", "--run", copy)
        assert "holds a transformer_nano, not a hope_nano" in line


def test_a_configuration_that_cannot_be_read(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    whole = (copy / "config.json").read_text()
    for text in (whole[:100], whole.replace('"width"', '"breadth"'), "[]", "{}"):
        (copy / "config.json").write_text(text)
        for line in (refused(capsys, *TRAIN, copy), refused(capsys, "eval", copy)):
            assert f"{copy}/config.json is no run configuration" in line
    assert (copy / "config.json").read_text() == "{}"


def test_a_run_without_a_checkpoint(trained, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "config.json", tmp_path / "run")
    assert "no checkpoint in" in refused(capsys, "eval", tmp_path / "run")


def flip(folder, step):
    """Flip one bit of a checkpoint's values; files also hold bytes that nothing reads."""
    files = (folder / "checkpoints" / str(step)).rglob("*")
    for path in sorted(filter(Path.is_file, files), key=lambda p: -p.stat().st_size):
        whole = path.read_bytes()
        # some of these are bits of moments, which nothing here loads
        for place in (len(whole) * part // 17 for part in range(1, 17)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                nj.load(folder)
            if any("leaf" in str(warning.message) for warning in caught):
                return
        path.write_bytes(whole)
    pytest.fail("no bit of the checkpoint matters")


# When one of orbax's reads fails, the others are never awaited, which the collector reports.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_costs_one_checkpoint(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    flip(copy, 12)
    gc.collect()
    code, out, err = command(capsys, *TRAIN, copy)
    assert code == 0 and "continues at step 8" in out
    assert err.startswith("nestedjax train: warning: checkpoint of step 12 is damaged (")
    assert "leaf" in err and err.endswith("using step 8 instead\n") and err.count("\n") == 1
    assert (copy / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    assert list((copy / "checkpoints-damaged").iterdir())


def test_no_whole_checkpoint(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    for path in (copy / "checkpoints").rglob("meta/metadata"):
        path.write_bytes(path.read_bytes()[:-20])
    before = tree(copy)
    for arguments in ((*TRAIN, copy), ("eval", copy)):
        code, _, err = command(capsys, *arguments)
        assert code == 2 and err.count("\n") == 1 and "no checkpoint in" in err
    assert tree(copy) == before


def test_a_number_that_is_not_finite_is_named(text, tmp_path, capsys):
    bad = ("--learning-rate", "1e15", "--clip", "none", "--warmup", "0")
    settings = flags(*TRANSFORMER, *RUN, *bad)
    code, _, err = command(capsys, *TRAIN, tmp_path / "run", "--data", text, *settings)
    assert code == 1 and err.count("\n") == 1
    assert "step 2: level " in err and "lower learning_rate" in err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (b"", "(it is empty)"),
        (b"[]", "([] is not an object {...})"),
        (b"null", "(None is not an object {...})"),
        (b"\xff\xfe", "can't decode byte"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        ({"width": "16"}, "(model.width='16' must be a whole number)"),
        ({"width": None}, "(model.width=None must be a whole number)"),
        ({"width": 2**70}, "(model: width=1180591620717411303424 must be at most 2147483647)"),
        ({"dtype": "float8"}, "(model.dtype='float8' must be one of float32, bfloat16, float64)"),
        ({"attention": {"heads": 2}}, "(model.attention: object missing required field context)"),
        ({"attention": 3}, "(model.attention=3 must be an object {...})"),
        ({"type": "os:path"}, "type='os:path': no model 'path' in os; its class is a subclass of"),
        ({"type": "nestedjax.run.config:DataConfig"}, "no model 'DataConfig' in nestedjax.run"),
        ({"type": None}, "(its model's type is None, not module:Class)"),
        ({"breadth": 1}, "(unknown setting 'model.breadth'; did you mean"),
        (("layout", "2"), "(layout='2' must be a whole number; this reads 2)"),
        (("layout", []), "(layout=[] must be a whole number; this reads 2)"),
        (("seed", float("nan")), "(seed=nan must be a whole number)"),
        (
            ("optimizer", {"weight_decay": float("nan")}),
            "(optimizer: weight_decay=nan must be a fi",
        ),
        (("given", ["x"]), "(given=['x'] must be a tuple, each part one of data, loss)"),
    ],
)
def test_a_configuration_names_the_file_the_key_and_the_value(
    wrong, says, trained, tmp_path, capsys
):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/config.json"
    if not isinstance(wrong, bytes):
        whole = json.loads((trained / "config.json").read_text())
        if isinstance(wrong, dict):
            wrong = ("model", {**whole["model"], **wrong})
        wrong = json.dumps({**whole, wrong[0]: wrong[1]}).encode()
    path.write_bytes(wrong)
    for arguments in ((*TRAIN, tmp_path / "run"), ("eval", tmp_path / "run")):
        line = refused(capsys, *arguments)
        assert f"{path}" in line and says in line


def test_ctrl_c_saves_and_says_how_to_go_on(text, tmp_path, capsys, monkeypatch):
    from nestedjax.cli import progress

    show = progress.Progress.__call__

    def interrupt(self, event):
        show(self, event)
        if getattr(event, "step", 0) == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Progress, "__call__", interrupt)
    settings = flags(*TRANSFORMER, *RUN, "--checkpoint-every", "100")
    run = tmp_path / "run"
    code, out, _ = command(capsys, *TRAIN, run, "--data", text, *settings)
    last = out.splitlines()[-1]
    assert code == 130 and last.startswith("stopped by Ctrl-C at step ")
    assert last.endswith(f"saved; continue with: nestedjax train transformer_nano --run {run}")
    step = int(last.split(" step ")[1].split(",")[0])
    assert 4 <= step < 12 and (run / "checkpoints" / str(step)).exists()


def test_a_bug_is_not_hidden(trained, capsys, monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("nestedjax.run.load", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["eval", str(trained)])
