"""Configurations: presets, settings by name, JSON."""

import dataclasses
import json

import pytest

from nestedjax import configs, models, overrides
from nestedjax.optim import menu
from nestedjax.overrides import ConfigError


@pytest.mark.parametrize("name", list(models.PRESETS))
def test_presets_fit_their_models_and_survive_json(name):
    run = configs.check(configs.run_preset(name))
    assert configs.from_json(json.loads(json.dumps(configs.to_json(run)))) == run
    for period in models.periods(run.model).values():
        assert period is None or period % run.step_tokens == 0


def test_every_setting_can_be_set_to_its_own_value():
    for name in ("hope_nano", "transformer_nano"):
        run = configs.run_preset(name)
        for key, value in configs.flat(run).items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert configs.change(run, [f"{key}={text}"]) == run, key


def test_no_two_settings_share_a_name():
    for preset in models.PRESETS:
        run = configs.change(configs.run_preset(preset), ["optimizer=adamw"])
        hidden = ("preset", "data.files", "optimizer.arguments")
        paths = [p for p in overrides.settings(run) if p not in hidden]
        plain = len(paths) - ("data.vocabulary" in paths)
        assert len(configs.flat(run)) == plain + len(menu.arguments("adamw"))


def test_values_are_read_by_type():
    @dataclasses.dataclass(frozen=True)
    class Config:
        whole: int = 0
        number: float | None = None
        flag: bool = False
        many: tuple[int | None, ...] = ()

    for path, text, value in (
        ("whole", "1_000", 1000),
        ("number", "1e-3", 1e-3),
        ("number", "none", None),
        ("flag", "True", True),
        ("many", "1, none", (1, None)),
        ("many", "5", (5,)),
    ):
        assert getattr(overrides.replace(Config(), path, text), path) == value
    for path, text in (("whole", "1.5"), ("whole", "none"), ("flag", "1"), ("many", "a")):
        with pytest.raises(ConfigError, match=f"{path}={text} is not"):
            overrides.replace(Config(), path, text)


def test_what_may_change():
    run = configs.run_preset("hope_nano")
    grown = configs.change(run, ["steps=2000", "validate_every=7", "sample_every=none"])
    assert configs.changed(run, grown) == {}
    other = configs.change(run, ["layers=1", "b2=0.9"])
    assert configs.changed(run, other) == {"layers": (2, 1), "b2": (0.95, 0.9)}


def test_configurations_stay_small():
    for kind in (configs.RunConfig, configs.DataConfig, configs.OptimizerConfig):
        assert len(dataclasses.fields(kind)) <= 15
