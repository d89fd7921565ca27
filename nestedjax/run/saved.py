"""A run as the JSON object in its folder, and back."""

import dataclasses
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from nestedjax.errors import ConfigError, near
from nestedjax.run.config import ModelConfig, RunConfig
from nestedjax.run.settings import arguments_of
from nestedjax.version import __version__

LAYOUT = 2  # of config.json, of what lies beside it, and of the names of the weights
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


def from_json(values: Mapping[str, Any], modules: Sequence[str] = ()) -> RunConfig:
    """A run from its JSON object.

    Args:
      values: from `to_json`; settings that are missing take their defaults.
      modules: names of the modules to import, in which its model's class may be.

    Raises:
      ValueError: it is no run; `ConfigError` if it is another layout's, or its model's class is in
        no module that was named.
    """
    values = dict(values)
    layout = values.pop("layout", 1)
    if layout != LAYOUT and "model" in values:
        reader = READ_BY.get(layout, "a newer nestedjax")
        raise ConfigError(
            f"the run folder has layout {layout}, which {reader} reads; this is nestedjax"
            f" {__version__}, which reads layout {LAYOUT}"
        )
    model = dict(values.get("model", {}))
    kind = class_of(model.pop("type", ""), modules)
    config = msgspec.convert({**values, "model": msgspec.convert(model, kind)}, RunConfig)
    for name in _unknown({**values, "model": model}, msgspec.to_builtins(config)):
        raise ValueError(f"unknown setting {name!r}")
    optimizer = config.optimizer
    kinds = {name: kind for name, (kind, _, _) in arguments_of(optimizer.name).items()}
    typed = {name: msgspec.convert(v, kinds[name]) for name, v in optimizer.arguments.items()}
    return dataclasses.replace(config, optimizer=dataclasses.replace(optimizer, arguments=typed))


def import_modules(modules: Sequence[str]) -> None:
    """Import modules of the user's own, whose presets (`models.PRESETS.add`) are then known.

    Raises:
      ConfigError: there is no such module.
    """
    for name in [modules] if isinstance(modules, str) else modules:
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


def class_of(name: str, modules: Sequence[str] = ()) -> type:
    """The class that `type_name` named; only modules that were named are imported.

    Raises:
      ConfigError: its module was not named, or has no such configuration.
      ValueError: the name has another form.
    """
    import_modules(modules)
    module, _, qualified = name.partition(":")
    if not qualified:
        raise ValueError(f"its model's type is {name!r}, not module:Class")
    if module not in sys.modules:
        raise ConfigError(
            f"the run's model is {name}, of a module that was not named; give --import {module}"
            f" (in Python modules=[{module!r}])"
        )
    found: Any = sys.modules[module]
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not dataclasses.is_dataclass(found) or not isinstance(found, type):
        known = [n for n, v in vars(sys.modules[module]).items() if dataclasses.is_dataclass(v)]
        raise ConfigError(f"no model {qualified!r} in {module}; {near(qualified, known)}")
    return found


def _unknown(values: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """Names in `values` that no setting has; msgspec passes over them in dataclasses."""
    for name, value in values.items():
        if name not in known:
            yield name
        elif isinstance(value, Mapping) and isinstance(known[name], Mapping):
            yield from (f"{name}.{inner}" for inner in _unknown(value, known[name]))
