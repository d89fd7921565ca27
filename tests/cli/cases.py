"""Commands at random: one that works, with up to two things changed."""

import json
import shutil
import typing

from hypothesis import strategies as st

import nestedjax as nj
from nestedjax import run
from nestedjax.cli.flags import NAMES
from tests.cli import tiny

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
        (NAMES.get(name, "--" + name.replace("_", "-")), setting.kind)
        for name, setting in run.settings(nj.run_preset(preset)).items()
    ]
    for preset in PRESETS
}
EVERY_FLAG = sorted({flag for settings in SETTINGS.values() for flag, _ in settings})
# What is written behind a flag. Numbers that would only ask for more memory than there is are left
# out: nothing is allocated here.
VALUES = st.one_of(
    st.sampled_from(
        "0 1 2 3 4 8 16 32 -1 0.5 1.0 1e-3 nan inf -inf none true false 1e9 1e999".split()
    ),
    st.sampled_from(
        ["", " ", "x", "\n", "５", "²", "1e3", "0x10", "1_0", "+2", "--", "-", "=", "9" * 5000]
    ),
    st.sampled_from("-1e9 2147483648 9223372036854775808 1180591620717411303424 3.4e39".split()),
    st.sampled_from(
        "bfloat16 float64 float8 full xla pallas_gpu contiguous shuffled m3 dgd soap".split()
    ),
    st.text(max_size=6),
)
FLAGS = st.one_of(
    st.sampled_from(EVERY_FLAG),
    st.sampled_from(EVERY_FLAG),
    st.sampled_from(
        "--lr --bs --ste --help --run --config --mesh --import --optimizer.period".split()
    ),
    st.sampled_from(
        "--no-literal --memory.no-momentum --optimizer.b1 -x -- --data --tokenizer".split()
    ),
    st.text(max_size=8).map(lambda text: f"--{text}"),
)
LINES = st.sampled_from(
    [
        b"To be, or not to be\n",
        b"\xff\xfe\x00",
        b"\x00" * 9,
        "naïve 日本 \U0001f600\n".encode(),
        b"{}\n",
    ]
)
TEXTS = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda line, n: line * n, LINES, st.sampled_from([1, 40, 900])),
    st.sampled_from([b"", b"x", b"\n" * 3000, b"long " * 4000, tiny.TEXT.encode("utf-16")]),
    st.builds(lambda n: b'{"text": "' + b"a" * n + b'"}\n', st.sampled_from([0, 9, 5000])),
)
FILES = st.sampled_from(
    [
        "book.txt",
        "book.jsonl",
        "book.gz",
        "book.txt.gz",
        "book",
        "日本.txt",
        "a b.txt",
        "-x.txt",
        "n\nl.txt",
    ]
)
JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(
        [2**70, -(2**63), 1e300, [], {}, [1], {"a": 1}, "os:path", [[]], "data", 10**400]
    ),
)
RAW = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"[]", b"null", b"{", b"[" * 5000, b"\xff", b"NaN", b'{"step": 1}\n{"st', b"1\n"]
    ),
)


@st.composite
def flag_change(draw):
    values = draw(st.lists(VALUES, max_size=2))
    return ("flag", draw(FLAGS), values, draw(st.booleans()))


@st.composite
def fitting_change(draw, preset):
    """A setting with a value of its type, which may still be out of range or fit nothing else."""
    flag, kind = draw(st.sampled_from(SETTINGS[preset]))
    if kind is bool:
        return ("flag", flag, [draw(st.sampled_from(["true", "false"]))], True)
    choices = [c for c in (kind, *typing.get_args(kind)) if typing.get_origin(c) is typing.Literal]
    if choices:
        return ("flag", flag, [str(draw(st.sampled_from(typing.get_args(choices[0]))))], False)
    numbers = (
        "0 0.1 0.5 1 2.5 1e-5 1000" if kind in (float, float | None) else "0 1 2 4 8 16 32 128"
    )
    count = 3 if "tuple" in str(kind) else 1
    values = st.sampled_from([*numbers.split(), *["none"] * ("None" in str(kind))])
    return ("flag", flag, draw(st.lists(values, min_size=1, max_size=count)), False)


OTHER_CHANGES = st.one_of(
    flag_change(),
    flag_change(),
    st.tuples(st.just("text"), FILES, TEXTS),
    st.tuples(
        st.just("json"), st.integers(0, 10**6), JSON, st.sampled_from(["set", "drop", "add"])
    ),
    st.tuples(st.just("raw"), st.sampled_from(["config.json", "metrics.jsonl", "book.model"]), RAW),
    st.tuples(st.just("folder"), st.sampled_from(["file", "foreign", "missing", "no checkpoints"])),
    st.tuples(
        st.just("prompt"), st.one_of(st.text(max_size=20), st.sampled_from(["\udcff", "a" * 3000]))
    ),
    st.tuples(st.just("word"), st.sampled_from(["", "x", "hope_micro", "-5", "steps=3", "\udcff"])),
)
COMMANDS = st.sampled_from(
    ["new"] * 4 + ["continue", "continue", "config", "eval", "generate", "levels"]
)


@st.composite
def cases(draw):
    """A command, a preset, and up to two changes; half of them are of a setting, and fit it."""
    command, preset = draw(COMMANDS), draw(st.sampled_from(list(PRESETS)))
    change = st.one_of(fitting_change(preset), OTHER_CHANGES)
    return command, preset, draw(st.lists(change, max_size=2))


CASES = cases()


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
        (place / "work/run").mkdir(exist_ok=True)
        (place / "work/run" / name).write_bytes(raw)
    if kind == "json":
        path = place / "work/run/config.json"
        try:
            path.write_text(json.dumps(mutated(json.loads(path.read_bytes()), *how)))
        except (OSError, ValueError, RecursionError):  # another change has broken it
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
    if how == "file" and not (work / "new").exists():
        (work / "new").write_text("a file")
    if how == "foreign" and not (work / "new").exists():
        (work / "new").mkdir()
        (work / "new/photo.jpg").touch()
    if how == "missing":
        shutil.rmtree(work / "run", ignore_errors=True)
    if how == "no checkpoints":
        shutil.rmtree(work / "run/checkpoints", ignore_errors=True)
