"""Settings by name: presets, types, meanings, changes, JSON."""

import dataclasses
import json
import sys

import numpy as np
import pytest

import nestedjax as nj
from nestedjax import models, run
from nestedjax.run import ConfigError
from tests.run.tiny import HOPE


@pytest.mark.parametrize("name", list(models.PRESETS))
def test_presets_fit_their_models_and_survive_json(name):
    config = nj.run_preset(name)
    assert run.from_json(json.loads(json.dumps(run.to_json(config)))) == config
    for period in models.periods(config.model).values():
        assert period is None or period % config.step_tokens == 0


@pytest.mark.parametrize("name", list(models.PRESETS))
def test_every_setting_has_a_meaning_and_can_be_set_to_its_own_value(name):
    config = nj.run_preset(name)
    found = run.settings(config)
    assert [s.name for s in found.values() if not s.doc] == []
    assert run.replaced(config, {n: s.value for n, s in found.items()}) == config


def test_the_mapping_changes_the_model_and_keywords_the_run():
    config = nj.run_preset(
        "hope_nano", {**HOPE, "dtype": "bfloat16"}, steps=7, batch=8, learning_rate=np.float32(0.5)
    )
    assert config.model.memory.chunk_size == 8 and config.model.cms.periods == (None, 128)
    assert config.loop.steps == 7 and config.optimizer.learning_rate == 0.5
    assert nj.run_preset(config.model, steps=7).model == config.model
    chosen = nj.run_preset("hope_nano", optimizer={"name": "soap", "refresh": 3})
    assert chosen.optimizer.name == "soap" and chosen.optimizer.arguments == {"refresh": 3}
    other = run.replaced(chosen, {"optimizer.b1": 0.5})
    assert other.optimizer.arguments == {"refresh": 3, "b1": 0.5}
    assert run.replaced(other, {"optimizer": "adamw"}).optimizer.arguments == {}
    slow = nj.run_preset("hope_nano", optimizer={"name": "m3", "period": (5, 20)})
    assert run.settings(slow)["optimizer.period"].value == (5, 20)
    assert run.from_json(json.loads(json.dumps(run.to_json(slow)))) == slow


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        ({}, {"lenght": 3}, "unknown setting 'lenght'; did you mean length"),
        ({"memory.chunksize": 3}, {}, "did you mean memory.chunk_size"),
        ({"steps": 3}, {}, "steps is a setting of the run: give it as steps="),
        ({}, {"width": 3}, "width is a setting of the model: give it as {'width': ...}"),
        ({"width": 3.5}, {}, "width=3.5 must be a whole number"),
        ({"memory.chunk_size": True}, {}, "memory.chunk_size=True must be a whole number"),
        (
            {"cms.periods": (1, "x")},
            {},
            "cms.periods=(1, 'x') must be a tuple, each part a whole number or none",
        ),
        ({"dtype": "float8"}, {}, "dtype='float8' must be one of float32, bfloat16, float64"),
        ({}, {"optimizer": "m4"}, "no optimizer 'm4'; there are adamuon, adamw"),
        ({}, {"optimizer": {"name": "m3", "beta": 1}}, "m3 has no argument 'beta'; it has b1"),
        ({}, {"optimizer": "adamw", "optimizer.period": 3}, "adamw has no argument 'period'"),
        ({}, {"optimizer.b1": 7.0}, "b1=7.0 must be at least 0 and less than 1"),
        ({}, {"optimizer": "ggd", "b1": 0.5}, "leaves no parameters to another AdamW, so that b1"),
        ({}, {"length": 80}, "length=80 is not a multiple of the chunk of 32 tokens; use length=6"),
        ({"cms.periods": (100, 250)}, {}, "100 does not divide 250"),
    ],
)
def test_mistakes_are_named_in_one_line(changes, settings, says):
    with pytest.raises(ConfigError) as caught:
        nj.run_preset("hope_nano", changes, **settings)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_preset_that_is_none():
    for wrong, says in (("hope_nan", "did you mean hope_nano"), (7, "7 is neither a preset's")):
        with pytest.raises(ConfigError, match=says):
            nj.run_preset(wrong)


def test_the_vocabulary_comes_from_the_tokenizer_where_text_is_given():
    assert nj.run_preset("hope_micro").model.vocab == 8192
    assert nj.run_preset("hope_micro", files="book.txt").model.vocab == 256
    assert nj.run_preset("hope_micro", {"vocab": 300}, files="book.txt").model.vocab == 300


def test_paths_are_kept_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = nj.run_preset("hope_nano", files=["a.txt", "gs://bucket/b.txt"])
    assert config.data.files == (str(tmp_path / "a.txt"), "gs://bucket/b.txt")


def test_what_may_change():
    config = nj.run_preset("hope_nano")
    grown = run.replaced(config, {"steps": 2000, "validate_every": 7, "sample_every": None})
    assert run.changed(config, grown) == {}
    other = run.replaced(config, {"layers": 1, "b2": 0.9, "optimizer.b3": 0.8})
    assert run.changed(config, other) == {
        "layers": (2, 1),
        "b2": (0.95, 0.9),
        "optimizer.b3": (0.9, 0.8),
    }


def test_configurations_stay_small():
    for kind in (run.RunConfig, run.DataConfig, run.OptimizerConfig):
        assert len(dataclasses.fields(kind)) <= 15


MODULE = """
import dataclasses
from typing import Literal
from nestedjax import models

@dataclasses.dataclass(frozen=True)
class Gate:
    '''A gate.

    Attributes:
      bias: logit at the start.
    '''
    bias: float = 1.0

@dataclasses.dataclass(frozen=True)
class Mine(models.TransformerConfig):
    '''Mine.

    Attributes:
      kind: of it.
      steps: of something.
    '''
    kind: Literal["a", "b"] = "a"
    steps: int = 3
    gate: Gate = Gate()

def make():
    _ = models.PRESETS["transformer_nano"]
    return Mine(_.vocab, _.width, _.layers, _.hidden, _.attention)

models.PRESETS.add("mine_nano", make)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models.PRESETS, "_makers", dict(models.PRESETS._makers))
    yield "my_models"
    sys.modules.pop("my_models", None)


def test_a_configuration_of_a_users_own_module(mine):
    config = nj.run_preset("transformer_nano")
    saved = run.to_json(config)
    assert saved["model"]["type"] == "nestedjax.models.transformer:TransformerConfig"
    saved["model"] |= {"type": "my_models:Mine", "kind": "b", "gate": {"bias": 2.0}}
    with pytest.raises(ConfigError, match="give --import my_models") as caught:
        run.from_json(saved)
    assert "\n" not in str(caught.value) and "my_models" not in sys.modules
    loaded = run.from_json(saved, modules=[mine])
    assert type(loaded.model).__name__ == "Mine" and loaded.model.kind == "b"
    assert loaded.model.gate.bias == 2.0
    assert run.from_json(run.to_json(loaded)) == loaded
    named = nj.run_preset("mine_nano", {"kind": "b", "gate.bias": 0.5, "model.steps": 4}, steps=9)
    assert named.model.steps == 4 and named.loop.steps == 9 and named.model.gate.bias == 0.5
    found = run.settings(named)
    assert found["gate.bias"].doc == "logit at the start." and found["width"].doc


def test_a_module_that_is_none(mine):
    with pytest.raises(ConfigError, match="no module 'no_such' to import"):
        run.import_modules(["no_such"])
    saved = run.to_json(nj.run_preset("transformer_nano"))
    saved["model"]["type"] = "my_models:Other"
    with pytest.raises(ConfigError, match="no model 'Other' in my_models; there are Mine"):
        run.from_json(saved, modules=[mine])


def test_what_is_no_configuration_is_refused():
    whole = run.to_json(nj.run_preset("hope_nano"))
    for change, says in (
        ({"seed": "0"}, "seed='0' must be a whole number"),
        ({"speed": 1}, "unknown setting 'speed'"),
        ({"data": {**whole["data"], "breadth": 1}}, "unknown setting 'data.breadth'"),
        (
            {"model": {**whole["model"], "cms": {"periods": [1]}}},
            "model.cms: object missing required field hidden",
        ),
        ({"optimizer": {**whole["optimizer"], "arguments": {"beta": 1}}}, "no argument 'beta'"),
    ):
        with pytest.raises(ValueError, match=says):
            run.from_json({**whole, **change})


def test_another_layout_is_refused_in_one_line():
    old = run.to_json(nj.run_preset("hope_nano"))
    del old["layout"]
    old["model"]["type"] = "HopeConfig"
    for values, says in (
        (old, f"layout 1, which nestedjax 0.1 reads; this is nestedjax {nj.__version__}"),
        ({**old, "layout": 9}, "layout 9, which a newer nestedjax reads"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            run.from_json(values)
        assert "\n" not in str(caught.value)
