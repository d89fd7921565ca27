"""Every number of every configuration states its range once, and is held to it."""

import dataclasses
import math
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import nestedjax as nj
from nestedjax import fields, models, run
from nestedjax.run import ConfigError

# One preset of each architecture.
PRESETS = [name for name in models.PRESETS if name.endswith("_nano")]
NUMBERS = (math.nan, math.inf, -math.inf, -1e9, 0, -1, 2**70)
OTHERS = ("16", True, None, 2.5, [], b"1", {}, object)


def configurations(config):
    """A configuration and all that are in it."""
    yield config
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from configurations(value)


EVERY = {type(part): part for preset in PRESETS for part in configurations(nj.run_preset(preset))}


def numeric(kind):
    """int or float, if an annotation is of such numbers."""
    if kind in (int, float):
        return kind
    return next(filter(None, map(numeric, typing.get_args(kind))), None)


def several(kind):
    return typing.get_origin(kind) is tuple or any(map(several, typing.get_args(kind)))


def of_a_number(cls):
    found = {}
    for name, kind in fields.hints(cls).items():
        if typing.get_origin(kind) is not typing.Literal and numeric(kind):
            found[name] = kind
    return found


CASES = [(cls, name, kind) for cls in EVERY for name, kind in of_a_number(cls).items()]


def test_all_configurations_are_found():
    names = {cls.__name__ for cls in EVERY}
    assert names >= {
        *("RunConfig", "DataConfig", "OptimizerConfig", "LoopConfig", "HopeConfig", "CMSConfig"),
        *("InnerConfig", "SelfModifyingConfig", "AttentionConfig", "RetNetConfig"),
    }
    assert len(CASES) > 60


def construct(config, name, value):
    """The configuration with another field, past what this suite enforces of annotations."""
    made = object.__new__(type(config))
    for field in dataclasses.fields(config):
        own = value if field.name == name else getattr(config, field.name)
        object.__setattr__(made, field.name, own)
    made.__post_init__()


def one_line(error, name, value):
    text = str(error)
    assert "\n" not in text and f"{name}=" in text and fields.shown(value) in text, text


@pytest.mark.parametrize(
    ("cls", "name", "kind"), CASES, ids=[f"{cls.__name__}.{name}" for cls, name, _ in CASES]
)
def test_a_number_is_in_its_range_or_refused(cls, name, kind):
    bounds = fields.range_of(kind)
    assert bounds is not None, f"{cls.__name__}.{name} states no range"
    config, number = EVERY[cls], numeric(kind)
    for value in (*NUMBERS, *OTHERS):
        given = (value,) if several(kind) else value
        is_one = isinstance(value, int | number) and not isinstance(value, bool)
        is_none = value is None and type(None) in parts(kind)
        fine = is_none or (is_one and not bounds.problem(value))
        try:
            construct(config, name, given)
        except ValueError as error:  # in its range, too, if it does not fit the others
            one_line(error, name, given)
        else:
            assert fine, f"{cls.__name__}({name}={given!r}) was taken"


def parts(kind):
    """The types of a union, of each part where there are several."""
    inner = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
    return typing.get_args(inner)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_setting_is_refused_by_its_whole_name(preset):
    config = nj.run_preset(preset)
    for setting in run.settings(config).values():
        if setting.path[0] == "optimizer" and setting.path[1] in ("name", "arguments"):
            continue  # an optimizer refuses those itself
        for value in (math.nan, -math.inf, "16x", b"", {}, object, -1e9, 10**5000):
            with pytest.raises(ConfigError) as caught:
                run.replaced(config, {setting.name: value})
                if setting.kind in (str | None, tuple[str, ...]):
                    raise ConfigError(f"{setting.name}={fields.shown(value)}")  # a path
            text = str(caught.value)
            place, _, name = setting.name.rpartition(".")
            whole = f"{setting.name}=" in text or text.startswith(f"{place}: {name}=")
            assert "\n" not in text and whole, text


def test_a_range_says_which_bound_is_broken():
    bounds = fields.Range(0, 1, without="high")
    assert str(bounds) == "at least 0 and less than 1"
    assert bounds.problem(1.0) == "less than 1" and bounds.problem(-0.5) == "at least 0"
    assert bounds.problem(math.nan) == "a finite number, at least 0 and less than 1"
    assert bounds.problem(0.0) == "" and fields.Range(0, without="low").problem(0) == "more than 0"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (({"layers": "1"},), "layers='1' must be a whole number"),
        (({"cms": 3},), "unknown setting 'cms'"),
        (({"cms.inner.weight_decay": 0.5},), "cms.inner: weight_decay=0.5 is of optimizer='adamw'"),
    ],
)
def test_wrong_types_in_python(given, says):
    with pytest.raises(ConfigError) as caught:
        nj.run_preset("hope_nano", *given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


# In a process of its own: in this suite annotations are enforced, and speak first.
SCRIPT = """
import nestedjax as nj
from nestedjax import run

config = nj.run_preset("hope_nano")
for wrong in (
    lambda: nj.train("x", "run"),
    lambda: nj.train(config, 5),
    lambda: nj.train(config, "run", mesh="data=1"),
    lambda: nj.train(config, "run", loss=5),
    lambda: nj.train(config, "run", on_event=5),
    lambda: nj.run_preset("hope_nano", 5),
    lambda: nj.run_preset("hope_nano", {1: 2}),
    lambda: nj.run_preset("hope_nano", optimizer=5),
    lambda: nj.load(5),
    lambda: run.RunConfig("x", "x"),
    lambda: run.import_modules([""]),
):
    try:
        wrong()
    except run.ConfigError as error:
        print(str(error).count(chr(10)), error)
"""


def test_wrong_types_are_refused_in_one_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(nj.__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    says = (
        "0 run is 'x'; make one with run_preset",
        "0 folder is 5; give a path",
        "0 mesh is 'data=1'; make one with nestedjax.sharding.make_mesh",
        "0 loss is 5; give a function, or leave it out",
        "0 on_event is 5; give a function, or leave it out",
        "0 changes=5 must be a mapping",
        "0 unknown setting '1'",
        "0 no optimizer 5; there are",
        "0 folder is 5; give the path of a run folder",
        "0 model='x' must be a models.ModelConfig",
        "0 no module '' to import",
    )
    for line, start in zip(found.stdout.splitlines(), says, strict=True):
        assert line.startswith(start)
    assert not (tmp_path / "run").exists()
