"""A run as the JSON object in its folder, and back."""

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from nestedjax import models
from nestedjax.errors import ConfigError, near, shown
from nestedjax.fields import hints, meaning
from nestedjax.optim import menu
from nestedjax.run.config import ModelConfig, OptimizerConfig, RunConfig
from nestedjax.run.settings import arguments_of
from nestedjax.version import __version__

LAYOUT = 2  # of config.json, of what lies beside it, and of the names of the weights
WAS_FLAT = ("objective", "dgd", "erase", "values", "inner_clip")  # of `memory.rule`, in `memory`
READ_BY = {1: "nestedjax 0.1"}  # which version reads the layouts before


def to_json(config: RunConfig) -> dict[str, Any]:
    """A run as a JSON object; its model's class is named as `module:Class`.

    Example:
      >>> from nestedjax.run import from_json, run_preset, to_json
      >>> run = run_preset("hope_nano")
      >>> from_json(to_json(run)) == run
      True
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    found = msgspec.to_builtins({n: v for n, v in fields.items() if n != "model"})
    model = {"type": type_name(config.model), **msgspec.to_builtins(config.model)}
    return {"layout": LAYOUT, **found, "model": model}


def from_json(values: Any, modules: Sequence[str] = ()) -> RunConfig:
    """A run from its JSON object.

    Args:
      values: what `to_json` returned; settings that are missing take their defaults.
      modules: names of the modules to import, in which its model's class may be.

    Raises:
      ValueError: it is no run, with the key and the value; `ConfigError` if it is another layout's,
        or its model's class is in no module that was named.
    """
    values = dict(_object(values, ""))
    model = dict(_object(values.get("model", {}), "model"))
    _check_layout(values.pop("layout", 1), whole="model" in values)
    kind = class_of(model.pop("type", None), modules)
    model = _with_rule(model)
    made = _converted(model, kind, "model")
    values["optimizer"] = _with_tuples(values.get("optimizer", {}))
    config = _converted({**values, "model": made}, RunConfig, "")
    known = msgspec.to_builtins(config)
    for name in _unknown({**values, "model": model}, known):
        raise ValueError(f"unknown setting {name!r}; {near(name, _names(known))}")
    return config


def _with_rule(model: dict[str, Any]) -> dict[str, Any]:
    """The model with what a memory writes under `memory.rule`, where it lay flat before."""
    memory = model.get("memory")
    if not isinstance(memory, Mapping) or "rule" in memory or not {*WAS_FLAT} & {*memory}:
        return model
    rule = {name: memory[name] for name in WAS_FLAT if name in memory}
    kept = {name: value for name, value in memory.items() if name not in rule}
    return {**model, "memory": {**kept, "rule": rule}}


def _object(values: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{f'{name}=' if name else ''}{shown(values)} is not an object {{...}}")
    return values


def _check_layout(layout: Any, *, whole: bool) -> None:
    """Refuse another layout than this version's; what is no run at all (not `whole`) has none."""
    if not isinstance(layout, int) or isinstance(layout, bool):
        raise ValueError(f"layout={shown(layout)} must be a whole number; this reads {LAYOUT}")
    if layout != LAYOUT and whole:
        reader = READ_BY.get(layout, "a newer nestedjax" if layout > LAYOUT else "no nestedjax")
        raise ConfigError(
            f"the run folder has layout {layout}, which {reader} reads; this is nestedjax"
            f" {__version__}, which reads layout {LAYOUT}"
        )


def _with_tuples(optimizer: Any) -> Any:
    """What JSON holds of an optimizer, with a tuple where one of its arguments takes several."""
    name, given = "", optimizer
    if isinstance(optimizer, Mapping):
        name, given = optimizer.get("name", OptimizerConfig().name), optimizer.get("arguments")
    if not isinstance(given, Mapping) or name not in (*menu.OPTIMIZERS,):
        return optimizer  # which `OptimizerConfig` refuses
    known = arguments_of(name)
    typed = {
        argument: _converted(value, known[argument][0], f"optimizer.arguments.{argument}")
        if argument in known
        else value
        for argument, value in given.items()
    }
    return {**optimizer, "arguments": typed}


def _converted(values: Any, kind: Any, name: str) -> Any:
    """What JSON holds as a type; an error names the setting and its value."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        why, _, path = str(error).partition(" - at `$")
        at, value = name, values
        for part in re.findall(r"[^.\[\]]+", path.removesuffix("`")):
            if isinstance(value, Mapping):
                value, kind = value[part], hints(kind)[part] if part in hints(kind) else Any
                at = f"{at}.{part}".removeprefix(".")
            else:  # the whole list is shown, and what each part is
                break
        if error.__cause__ is not None:  # a configuration's own refusal shows the value itself
            raise ValueError(f"{at}: {why}" if at else why) from error
        if isinstance(value, Mapping):
            raise ValueError(f"{at or 'it'}: {why[0].lower()}{why[1:]}".replace("`", "")) from error
        must = "an object {...}" if dataclasses.is_dataclass(kind) else meaning(kind)
        raise ValueError(f"{at}={shown(value)} must be {must}") from error


def import_modules(modules: Sequence[str]) -> None:
    """Import modules of the user's own, whose presets (`models.PRESETS.add`) are then known.

    Raises:
      ConfigError: there is no such module.
    """
    for name in [modules] if isinstance(modules, str) else modules:
        if not isinstance(name, str) or not all(name.split(".")):
            raise ConfigError(
                f"no module {shown(name)} to import; give its name as in Python's import"
            )
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0] and error.name != name:
                raise
            raise ConfigError(
                f"no module {name!r} to import; give its name as in Python's import, and run where"
                " Python finds it"
            ) from error


def type_name(config: ModelConfig) -> str:
    """The class of a model's configuration as `module:Class`."""
    return f"{type(config).__module__}:{type(config).__qualname__}"


def class_of(name: Any, modules: Sequence[str] = ()) -> type:
    """The class that `type_name` named; only modules that were named are imported.

    Raises:
      ConfigError: its module was not named, or has no such configuration.
      ValueError: the name has another form.
    """
    import_modules(modules)
    if not isinstance(name, str):
        raise ValueError(f"its model's type is {shown(name)}, not module:Class")
    module, _, qualified = name.partition(":")
    if not module or not qualified:
        raise ValueError(f"its model's type is {name!r}, not module:Class")
    if module not in sys.modules:
        raise ConfigError(
            f"the run's model is {name}, of a module that was not named; give --import {module}"
            f" (in Python modules=[{module!r}])"
        )
    found: Any = sys.modules[module]
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not _is_model(found):
        known = [n for n, v in vars(sys.modules[module]).items() if _is_model(v)]
        hint = near(qualified, known) if known else "its class is a subclass of models.ModelConfig"
        raise ConfigError(f"type={name!r}: no model {qualified!r} in {module}; {hint}")
    return found


def _is_model(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, models.ModelConfig)


def _names(known: Mapping[str, Any]) -> Iterator[str]:
    for name, value in known.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _names(value))


def _unknown(values: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """Names in `values` that no setting has; msgspec passes over them in dataclasses."""
    for name, value in values.items():
        if name not in known:
            yield name
        elif isinstance(value, Mapping) and isinstance(known[name], Mapping):
            yield from (f"{name}.{inner}" for inner in _unknown(value, known[name]))
