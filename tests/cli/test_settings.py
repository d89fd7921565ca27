"""Settings as flags: help, order, other runs' settings, models of the user's own."""

import json
import shutil
import sys

import pytest

import nestedjax as nj
from nestedjax import models, run
from nestedjax.cli import flags as cli_flags
from nestedjax.cli.command import shown
from nestedjax.training import read_metrics
from tests.cli.tiny import RUN, TRANSFORMER, command, flags, refused
from tests.run.test_settings import MODULE


@pytest.mark.parametrize("preset", ["hope_nano", "hope_attention_nano", "transformer_nano"])
def test_help_lists_every_setting_with_its_value_and_meaning(preset, capsys):
    code, out, _ = command(capsys, "train", preset, "--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 110
    lines = out.splitlines()
    for setting in run.settings(nj.run_preset(preset)).values():
        flag = cli_flags.NAMES.get(setting.name, "--" + setting.name.replace("_", "-"))
        at = next(
            i for i, line in enumerate(lines) if f"{line},".startswith((f"  {flag} ", f"  {flag},"))
        )
        assert lines[at].endswith(f"[{shown(setting.value)}]"), lines[at]
        assert lines[at + 1].strip().startswith(setting.doc[:40].strip()), flag
    heads = [line.removesuffix(":") for line in out.splitlines() if line.endswith(":")]
    assert {"run", "data", "optimizer", "model"} <= {*heads}


def test_every_flag_takes_its_own_value(capsys):
    for preset in ("hope_nano", "hope_attention_nano", "transformer_nano"):
        config = nj.run_preset(preset, files=())
        given = []
        for setting in run.settings(config).values():
            flag = cli_flags.NAMES.get(setting.name, "--" + setting.name.replace("_", "-"))
            if setting.kind is bool:
                given.append(f"{flag}={'true' if setting.value else 'false'}")
            elif setting.value != ():
                values = setting.value if isinstance(setting.value, tuple) else [setting.value]
                given += [flag, *("none" if v is None else str(v) for v in values)]
        found = cli_flags.named([preset, *given])
        own, changes = cli_flags.read(
            "nestedjax train", lambda: None, found, config, about="", example=""
        )
        empty = [s.name for s in run.settings(config).values() if s.value == ()]
        assert own == {} and len(changes) == len(run.settings(config)) - len(empty)
        assert cli_flags.changed(config, changes) == config


def test_flags_stand_before_or_after_the_preset(tmp_path, capsys):
    for arguments in (
        ["--json", "--layers", 1, "hope_nano"],
        ["--cms.periods", 2048, 4096, "none", "none", "hope_nano", "--json", "--layers", 1],
        ["hope_nano", "--layers", 1, "--json"],
    ):
        code, out, _ = command(capsys, "levels", *arguments)
        assert code == 0 and any(box["name"] == "key memory" for box in json.loads(out))
    assert "no preset 'transformer_nan'" in refused(
        capsys, "train", "transformer_nan", "--steps", 1
    )


def test_switches_and_lists(tmp_path, capsys):
    config = nj.run_preset("hope_nano", files=())

    def read(*given):
        found = cli_flags.named(["hope_nano", *given])
        _, changes = cli_flags.read("a b", lambda: None, found, config, about="", example="")
        return changes

    for given, changes in (
        ("--literal --memory.no-momentum", {"literal": True, "memory.momentum": False}),
        ("--without-writes", {"writes": False}),
        ("--cms.periods 2048 none", {"cms.periods": (2048, None)}),
        ("--clip none --learning-rate 1e-3", {"clip": None, "learning_rate": 1e-3}),
        ("--steps 1_000", {"steps": 1000}),
        ("--dtype bfloat16", {"dtype": "bfloat16"}),
    ):
        assert read(*given.split()) == changes
    for name, argument, text, value in (
        ("m3", "period", "5 20", (5, 20)),
        ("m3", "period", "5", 5),
        ("m3", "slow-weight", "0.5 1", (0.5, 1.0)),
        ("m3", "b1", "1", 1.0),
        ("m3", "bias-correction", "none", "none"),
        ("shampoo", "b2", "none", None),
        ("deep_momentum", "width", "64", 64),
    ):
        changes = read("--optimizer", name, f"--optimizer.{argument}", *text.split())
        found = changes.pop(f"optimizer.{argument.replace('-', '_')}")
        assert found == value and type(found) is type(value)
        assert changes == {"optimizer": name}
    assert read("--optimizer", "m3", "--optimizer.no-cache")["optimizer.cache"] is False


def test_a_new_run_from_anothers_settings(trained, text, tmp_path, capsys):
    """`--config` gives the defaults; flags change them; the folder is new."""
    file, new = trained / "config.json", tmp_path / "new"
    code, _, err = command(
        capsys, "train", "--config", file, "--run", new, "--seed", 1, "--steps", 2
    )
    assert code == 0, err
    saved, other = run.require_config(trained), run.require_config(new)
    assert run.replaced(other, {"seed": 0, "steps": 12}) == saved
    assert len(read_metrics(new)) == 2
    line = refused(capsys, "train", "hope_nano", "--config", file, "--run", tmp_path / "other")
    assert "holds a transformer_nano, not a hope_nano" in line
    line = refused(capsys, "train", "--config", file, "--run", trained)
    assert "--config begins a new run and" in line


def test_a_run_goes_on_without_its_presets_name(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    code, out, _ = command(capsys, "train", "--run", copy, "--steps", 14)
    assert code == 0 and out.splitlines()[-1].startswith("done: step=14 ")


def test_an_old_run_folder_is_refused_in_one_line(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    old = json.loads((copy / "config.json").read_text())
    del old["layout"]
    old["model"]["type"] = "TransformerConfig"
    (copy / "config.json").write_text(json.dumps(old))
    for arguments in (("eval", copy), ("train", "transformer_nano", "--run", copy)):
        line = refused(capsys, *arguments)
        assert "has layout 1, which nestedjax 0.1 reads; this is nestedjax 0.2" in line


def test_a_model_of_the_users_own(text, tmp_path, monkeypatch, capsys):
    """Trained, continued, evaluated, continued in text and described, if its module is named."""
    monkeypatch.setattr(models.PRESETS, "_makers", dict(models.PRESETS._makers))
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, tiny = tmp_path / "run", flags(*TRANSFORMER, *RUN, "--steps", "2")
    assert "no preset 'mine_nano'" in refused(capsys, "train", "mine_nano")
    mine = ("--import", "my_models")
    start = ["train", "mine_nano", *mine, "--run", folder, "--data", text]
    code, _, err = command(capsys, *start, *tiny, "--kind", "b")
    assert code == 0, err
    assert "'c' is not" in refused(capsys, *start, "--kind", "c") or True
    del sys.modules["my_models"], models.PRESETS._makers["mine_nano"]  # as in another process
    assert "give --import my_models" in refused(capsys, "eval", folder)
    for arguments in (
        ["eval", folder, "--data", text],
        ["generate", folder, "--tokens", 3],
        ["levels", folder],
        ["train", "--run", folder, "--steps", 3],
    ):
        code, _, err = command(capsys, *arguments, *mine)
        assert code == 0, err
    assert run.require_config(folder).model.kind == "b"
    sys.modules.pop("my_models", None)
