"""No traceback ever reaches who uses the command line: random commands end with 0, 1 or 2.

A case is a command that works with up to two things changed: a flag, the text, the run's folder, or
its files. All is real up to the first compilation: flags, text, building the model and the
optimizer, the files of the run. What would compile is replaced (`stubbed`).
500 cases run here, always the same ones; NESTEDJAX_FUZZ=3000 runs as many new ones.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

import nestedjax as nj
from nestedjax import run, training
from nestedjax.cli import main
from nestedjax.cli.flags import NAMES
from nestedjax.run import assemble, plots, trained
from nestedjax.run import training as running
from nestedjax.training import read_metrics
from tests.cli import tiny

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

LONG = int(os.environ.get("NESTEDJAX_FUZZ", "0"))
ENDS = {0: "done", 1: "training cannot go on", 2: "refused"}
LINEAR = ("--layers 1 --width 16 --hidden 16 --heads 2 --chunk-size 8").split()
PRESETS = {
    "transformer_nano": tiny.TRANSFORMER,
    "hope_nano": tiny.HOPE,
    "hope_attention_nano": tiny.HOPE_ATTENTION,
    "deltanet_nano": LINEAR,
    "retnet_nano": LINEAR,
}
SETTINGS = {
    preset: [
        NAMES.get(name, "--" + name.replace("_", "-"))
        for name in run.settings(nj.run_preset(preset))
    ]
    for preset in PRESETS
}

# What is written behind a flag. Numbers that would only ask for more memory than there is are left
# out: nothing is allocated here.
VALUES = st.one_of(
    st.sampled_from("0 1 2 3 4 8 16 32 -1 0.5 1.0 1e-3 nan inf -inf none true false 1e9 1e999".split()),
    st.sampled_from(["", " ", "x", "\n", "５", "²", "1e3", "0x10", "1_0", "+2", "--", "-", "=", "9" * 5000]),
    st.sampled_from("-1e9 2147483648 9223372036854775808 1180591620717411303424 3.4e39".split()),
    st.sampled_from("bfloat16 float64 float8 full xla pallas_gpu contiguous shuffled m3 dgd soap".split()),
    st.text(max_size=6),
)
FLAGS = st.one_of(
    *(st.sampled_from(flags) for flags in SETTINGS.values()),
    st.sampled_from("--lr --bs --ste --help --run --config --mesh --import --optimizer.period".split()),
    st.sampled_from("--no-literal --memory.no-momentum --optimizer.b1 -x -- --data --tokenizer".split()),
    st.text(max_size=8).map(lambda text: f"--{text}"),
)
LINES = st.sampled_from(
    [b"To be, or not to be\n", b"\xff\xfe\x00", b"\x00" * 9, "naïve 日本 \U0001f600\n".encode(), b"{}\n"]
)
TEXTS = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda line, n: line * n, LINES, st.sampled_from([1, 40, 900])),
    st.sampled_from([b"", b"x", b"\n" * 3000, b"long " * 4000, tiny.TEXT.encode("utf-16")]),
    st.builds(lambda n: b'{"text": "' + b"a" * n + b'"}\n', st.sampled_from([0, 9, 5000])),
)
FILES = st.sampled_from(
    ["book.txt", "book.jsonl", "book.gz", "book.txt.gz", "book", "日本.txt", "a b.txt", "-x.txt", "n\nl.txt"]
)
JSON = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=4),
    st.sampled_from([2**70, -(2**63), 1e300, [], {}, [1], {"a": 1}, "os:path", [[]], "data", 10**400]),
)
RAW = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"[]", b"null", b"{", b"[" * 5000, b"\xff", b"NaN", b'{"step": 1}\n{"st', b"1\n"]),
)


@st.composite
def flag_change(draw):
    values = draw(st.lists(VALUES, max_size=2))
    return ("flag", draw(FLAGS), values, draw(st.booleans()))


CHANGES = st.one_of(
    flag_change(),
    flag_change(),
    st.tuples(st.just("text"), FILES, TEXTS),
    st.tuples(st.just("json"), st.integers(0, 10**6), JSON, st.sampled_from(["set", "drop", "add"])),
    st.tuples(st.just("raw"), st.sampled_from(["config.json", "metrics.jsonl", "book.model"]), RAW),
    st.tuples(st.just("folder"), st.sampled_from(["file", "foreign", "missing", "no checkpoints"])),
    st.tuples(st.just("prompt"), st.one_of(st.text(max_size=20), st.sampled_from(["\udcff", "a" * 3000]))),
    st.tuples(st.just("word"), st.sampled_from(["", "x", "hope_micro", "-5", "steps=3", "\udcff"])),
)
COMMANDS = st.sampled_from(["new"] * 4 + ["continue", "continue", "config", "eval", "generate", "levels"])
CASES = st.tuples(COMMANDS, st.sampled_from(list(PRESETS)), st.lists(CHANGES, max_size=2))


class Loop:
    """In place of the training loop: it reads data and says what the loop says."""

    @staticmethod
    def train(loss_fn, state, *, dataset, config, valid, metrics, on_event, **_):
        on_event(training.Started(0, config.steps))
        next(iter(dataset.iterate(0)))
        metrics.resume(0)
        metrics.write({"step": 1, "loss": 1.0, "grad_norm": 1.0}, {})
        metrics.flush()
        return training.Result(state, None, {"val_loss": 1.0})

    def __getattr__(self, name):
        return getattr(training, name)


def new_state(config, built, tx, mesh):
    """The shapes of a state, and the number of its step."""
    del mesh
    state = jax.eval_shape(lambda: assemble._first_state(config, built, tx))
    return state._replace(step=np.int32(config.loop.steps))


def draws(definition, tokens, *_):
    return lambda weights, prompt, key: np.full(min(tokens, 9), 65, np.int32)


def scores(definition):
    def score(weights, tokens, targets, state):
        return np.ones(targets.shape, np.float32), state

    return lambda weights: None, score


class Restored:
    """In place of the checkpoints of a run that is read."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def restore(self, like, **_):
        return type("Restored", (), {"state": like, "step": 12})


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory):
    built = {}

    def build(config):
        key = repr((config.model, config.seed, config.optimizer.name == "dgd"))
        if key not in built:
            built[key] = assemble.build(config)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (running, trained):
            patch.setattr(module, "build", build)
        patch.setattr(running, "training", Loop())
        patch.setattr(running, "new_state", new_state)
        patch.setattr(running, "Checkpoints", Restored)
        patch.setattr(trained, "Checkpoints", Restored)
        patch.setattr(running, "cached_sampler", draws)
        patch.setattr(trained, "cached_sampler", draws)
        patch.setattr(trained, "_scorer", scores)
        patch.setattr(plots, "plot_losses", lambda folder, *_, **__: read_metrics(folder))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory, stubbed):
    """A folder with a text and a run of each preset."""
    where = tmp_path_factory.mktemp("fuzz")
    (where / "book.txt").write_text(tiny.TEXT)
    (where / "book.model").write_bytes(b"not a model")
    before = Path.cwd()
    os.chdir(where)
    for preset, small in PRESETS.items():
        folder = f"runs/of_{preset}"
        made = ["train", preset, "--run", folder, *small, *tiny.RUN, "--data", "book.txt"]
        assert main(made) == 0
        (where / folder / "checkpoints").mkdir(exist_ok=True)
    yield where
    os.chdir(before)


def prepared(place, case):
    """The arguments of a case, with its files written."""
    command, preset, changes = case
    shutil.rmtree(place / "work", ignore_errors=True)
    shutil.copytree(place / f"runs/of_{preset}", place / "work/run")
    small = [*PRESETS[preset], *tiny.RUN]
    arguments = {
        "new": ["train", preset, "--run", "work/new", "--data", "book.txt", *small],
        "continue": ["train", preset, "--run", "work/run"],
        "config": ["train", "--config", "work/run/config.json", "--run", "work/new"],
        "eval": ["eval", "work/run"],
        "generate": ["generate", "work/run", "--tokens", "4"],
        "levels": ["levels", preset, *small],
    }[command]
    for change in changes:
        arguments = changed(place, arguments, *change)
    return [argument.replace("\0", "") for argument in arguments]  # a process cannot be given it


def changed(place, arguments, kind, *how):
    """One thing changed, in the arguments or in the files."""
    if kind == "flag":
        flag, values, joined = how
        at = next((i for i, a in enumerate(arguments) if a == flag), len(arguments))
        end = at + 1
        while end < len(arguments) and not arguments[end].startswith("--"):
            end += 1
        given = [f"{flag}={values[0]}"] if joined and values else [flag, *values]
        return [*arguments[:at], *given, *arguments[end:]]
    if kind == "word":
        return [*arguments, *how]
    if kind == "prompt":
        return [*arguments, "--prompt", *how] if arguments[0] == "generate" else arguments
    if kind == "text":
        name, text = how
        path = place / "work" / name
        path.write_bytes(text)
        return changed(place, arguments, "flag", "--data", [f"work/{name}"], False)
    if kind == "raw":
        name, raw = how
        if name == "book.model":
            (place / "work" / name).write_bytes(raw)
            return [*arguments, "--tokenizer", f"work/{name}"]
        (place / "work/run" / name).write_bytes(raw)
    if kind == "json":
        path = place / "work/run/config.json"
        try:
            path.write_text(json.dumps(mutated(json.loads(path.read_bytes()), *how)))
        except (ValueError, RecursionError):  # another change has broken it
            pass
    if kind == "folder":
        spoiled(place / "work", *how)
    return arguments


def mutated(values, number, new, how):
    """A JSON object with one of its values, at any depth, replaced, removed or added."""
    places = []

    def walk(inside):
        for key, value in inside.items() if isinstance(inside, dict) else enumerate(inside):
            places.append((inside, key))
            if isinstance(value, dict | list):
                walk(value)

    if not isinstance(values, dict | list):
        return values
    walk(values)
    if not places:
        return values
    inside, key = places[number % len(places)]
    if how == "drop":
        del inside[key]
    elif how == "add" and isinstance(inside, dict):
        inside["unknown"] = new
    else:
        inside[key] = new
    return values


def spoiled(work, how):
    if how == "file":
        (work / "new").write_text("a file")
    if how == "foreign":
        (work / "new").mkdir(exist_ok=True)
        (work / "new/photo.jpg").touch()
    if how == "missing":
        shutil.rmtree(work / "run", ignore_errors=True)
    if how == "no checkpoints":
        shutil.rmtree(work / "run/checkpoints", ignore_errors=True)


def test_no_command_ends_in_a_traceback(place, capsys):
    """Every case ends with a code, and a refusal is one line on standard error."""
    ended = Counter()

    @hypothesis.settings(
        max_examples=LONG or 500,
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(CASES)
    def holds(case):
        arguments = prepared(place, case)
        code = main(arguments)
        out, err = capsys.readouterr()
        assert code in ENDS, (arguments, code)
        if code == 2:
            assert err.count("\n") == 1 and err.startswith("nestedjax"), (arguments, err)
        ended[arguments[0], ENDS[code]] += 1

    holds()
    with capsys.disabled():
        if LONG:
            print(dict(ended))
    total = sum(ended.values())
    assert sum(n for (_, end), n in ended.items() if end == "done") > 0.25 * total


PROCESSES = [
    (0, ["--help"]),
    (0, ["train", "hope_nano", "--help"]),
    (0, ["levels", "transformer_nano"]),
    (2, ["trian"]),
    (2, ["train"]),
    (2, ["train", "hope_nano", "--lr", "1"]),
    (2, ["train", "hope_nano", "--steps", "3", "--steps", "4"]),
    (2, ["train", "hope_nano", "--layers", ""]),
    (2, ["train", "hope_nano", "--layers="]),
    (2, ["train", "hope_nano", "--run", "\udcff", "--width", "0"]),
    (2, ["train", "\udcff"]),
    (2, ["train", "hope_nano", "--data", "\udcff.txt"]),
    (2, ["train", "hope_nano", "--seed", str(2**63)]),
    (2, ["train", "hope_nano", "--mesh", "data=0"]),
    (2, ["train", "hope_nano", "--dtype", "float64"]),
    (2, ["train", "--config", "deep.json"]),
    (2, ["train", "--config", "/dev/null"]),
    (2, ["train", "hope_nano", "--batch", "16"]),
    (2, ["eval", "."]),
    (2, ["generate", ".", "--prompt", "\udcff"]),
]


def test_processes_end_as_this_one_does(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    environment = {**os.environ, "PYTHONPATH": str(Path(nj.__file__).parents[1]), "LC_ALL": "C"}
    program = "import sys; from nestedjax.cli import main; sys.exit(main(sys.argv[1:]))"
    for code, arguments in PROCESSES:
        command = [sys.executable, "-c", program, *arguments]
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert found.returncode == code, (arguments, found.stderr)
        assert b"Traceback" not in found.stderr + found.stdout
        if code == 2:
            assert found.stderr.count(b"\n") == 1 and found.stdout == b""
