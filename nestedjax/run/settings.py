"""The settings of a run by name: their types, values and meanings, and runs with some changed.

A setting of the run is named flat (`steps`, `length`, `learning_rate`), one of the model by its
path in the model's configuration (`layers`, `memory.chunk_size`, `cms.periods`), an argument of the
optimizer `optimizer.ARGUMENT`. Types are those of the dataclasses, meanings those of the
"Attributes" in their docstrings: `run_preset`, the command line and its `--help` all read this.
"""

import contextlib
import dataclasses
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import docstring_parser
import msgspec
import numpy as np

from nestedjax.data import DataError, file_names
from nestedjax.errors import ConfigError, near, one_line, shown
from nestedjax.fields import Range, check_value, hints, range_of
from nestedjax.optim import menu
from nestedjax.run.config import RunConfig

# What a run is made of, and under which heading its settings are listed; those of the model last.
_GROUPS = {"loop": "run", "data": "data", "optimizer": "optimizer", "model": "model"}
# Not settings: where a run began, what `train` was given, and what stands under its own name.
_HIDDEN = {("preset",), ("given",), ("optimizer", "name"), ("optimizer", "arguments")}
# These affect when a run validates, saves and samples, not what it computes.
CHANGEABLE = ("steps", "validate_every", "checkpoint_every", "sample_every", "files", "tokenizer")


class Setting(NamedTuple):
    """One setting of a run.

    Attributes:
      name: such as `steps` or `memory.chunk_size`.
      kind: its type.
      value: in this run.
      doc: what it means, with its unit.
      group: the heading that it is listed under.
      path: of attributes from the `RunConfig` to it.
      range: of a number, or of each of several.
    """

    name: str
    kind: Any
    value: Any
    doc: str
    group: str
    path: tuple[str, ...]
    range: Range | None = None


def settings(config: RunConfig) -> dict[str, Setting]:
    """Every setting of a run by its name.

    Example:
      >>> from nestedjax.run import run_preset, settings
      >>> found = settings(run_preset("hope_nano"))
      >>> found["memory.heads"].value, found["length"].doc
      (4, 'tokens of a row.')
    """
    every = [*_fields(config, (), "", "run"), *_optimizer(config)]
    order = list(dict.fromkeys(["run", "data", "optimizer", *(s.group for s in every)]))
    found: dict[str, Setting] = {}
    for setting in sorted(every, key=lambda s: order.index(s.group)):
        name = setting.name
        if name in found:  # a user's model may have a setting of the run's name
            name = f"model.{name}"
        found[name] = setting._replace(name=name)
    return found


def replaced(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The run with settings changed.

    Args:
      config: where to start; not changed.
      changes: name -> value. Of `optimizer` the value is a name, whose arguments begin anew, or
        a mapping of `name` and arguments.

    Raises:
      ConfigError: an unknown name, a value of another type, or one that the configuration refuses.

    Example:
      >>> from nestedjax.run import replaced, run_preset
      >>> run = replaced(run_preset("hope_nano"), {"steps": 20, "memory.chunk_size": 64})
      >>> run.loop.steps, run.model.memory.chunk_size
      (20, 64)
    """
    if not isinstance(changes, Mapping):
        raise ConfigError(f"changes={shown(changes)} must be a mapping of settings to values")
    changes = _flat(changes)
    config = _with_optimizer(config, changes.pop("optimizer", config.optimizer.name))
    known, paths = settings(config), dict[Sequence[str], Any]()
    for name, value in changes.items():
        if name not in known:
            raise ConfigError(_unknown(config, str(name), known))
        paths[known[name].path] = _typed(known[name], value)
    return _without_usual(_rebuilt(config, paths))


def changed(saved: RunConfig, asked: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between two runs and matter to what they compute: name -> both values.

    More steps are no difference: a run may grow. Nor is where files lie: text and tokenizer are
    compared themselves.
    """
    old, new = ({n: s.value for n, s in settings(run).items()} for run in (saved, asked))
    return {
        name: (old.get(name), new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name) and name not in CHANGEABLE
    }


def arguments_of(name: str) -> dict[str, tuple[Any, Any, str]]:
    """The arguments of an optimizer by name: type, default, meaning."""
    return {a.name: (a.type, a.default, a.doc) for a in menu.arguments(name).values()}


def _fields(config: Any, path: tuple[str, ...], prefix: str, group: str) -> Iterator[Setting]:
    kinds, docs = typing.get_type_hints(type(config)), _attributes(type(config))
    for field in dataclasses.fields(config):
        name, value, here = field.name, getattr(config, field.name), (*path, field.name)
        if here in _HIDDEN or not field.init:
            continue
        if not dataclasses.is_dataclass(value):
            doc = docs.get(name, "")
            bounds = range_of(hints(type(config))[name])
            yield Setting(prefix + name, kinds[name], value, doc, group, here, bounds)
        elif not path:
            yield from _fields(value, here, "", _GROUPS[name])
        else:
            yield from _fields(value, here, f"{prefix}{name}.", prefix + name)


def _optimizer(config: RunConfig) -> Iterator[Setting]:
    chosen = config.optimizer
    names = typing.Literal[(*menu.OPTIMIZERS,)]  # type: ignore[valid-type]
    doc = "what steps the weights; its own arguments are listed for the one that is chosen."
    yield Setting("optimizer", names, chosen.name, doc, "optimizer", ("optimizer", "name"))
    for name, (kind, default, doc) in arguments_of(chosen.name).items():
        value, path = chosen.arguments.get(name, default), ("optimizer", "arguments", name)
        yield Setting(f"optimizer.{name}", kind, value, doc, "optimizer", path)


def _attributes(cls: type) -> dict[str, str]:
    """The documented attributes of a dataclass, those of its bases among them."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _documentation(base, "Attributes")
    return found


def _documentation(documented: Any, section: str) -> dict[str, str]:
    parsed = docstring_parser.google.parse(vars(documented).get("__doc__") or documented.__doc__)
    kind = {"Attributes": "attribute", "Args": "param"}[section]
    items = [item for item in parsed.params if item.args[0] == kind]
    return {item.arg_name: " ".join((item.description or "").split()) for item in items}


def _flat(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes with `optimizer={"name": ..., argument: ...}` spread out."""
    found = dict(changes)
    if isinstance(given := found.get("optimizer"), Mapping):
        del found["optimizer"]
        found |= {"optimizer" if n == "name" else f"optimizer.{n}": v for n, v in given.items()}
    return found


def _with_optimizer(config: RunConfig, name: Any) -> RunConfig:
    if name == config.optimizer.name:
        return config
    if name not in (*menu.OPTIMIZERS,):
        hint = near(str(name), (*menu.OPTIMIZERS,))
        raise ConfigError(f"no optimizer {name!r}; {hint}")
    optimizer = dataclasses.replace(config.optimizer, name=name, arguments={})
    return dataclasses.replace(config, optimizer=optimizer)


def _without_usual(config: RunConfig) -> RunConfig:
    """The run without those arguments of its optimizer that are the defaults anyway."""
    usual, given = arguments_of(config.optimizer.name), config.optimizer.arguments
    kept = {name: value for name, value in given.items() if value != usual[name][1]}
    optimizer = dataclasses.replace(config.optimizer, arguments=kept)
    return dataclasses.replace(config, optimizer=optimizer)


def _unknown(config: RunConfig, name: str, known: Mapping[str, Any]) -> str:
    group, _, argument = name.partition(".")
    if group == "optimizer":
        there = ", ".join(arguments_of(config.optimizer.name)) or "none: set b1, b2, weight_decay"
        return f"optimizer={config.optimizer.name} has no argument {argument!r}; it has {there}"
    return f"unknown setting {name!r}; {near(name, known)}"


def _typed(setting: Setting, value: Any) -> Any:
    """The value as the setting's type holds it."""
    try:
        if setting.path == ("data", "files"):
            value = tuple(map(_whole, file_names(value)))
        if setting.path == ("data", "tokenizer") and value is not None:
            value = _whole(*file_names([value], what="tokenizer"))
    except DataError as error:
        raise ConfigError(str(error)) from error
    if isinstance(value, np.generic):
        value = value.item()
    # A list becomes a tuple and 1 becomes 1.0; what does not fit is said by the check.
    with contextlib.suppress(msgspec.ValidationError, TypeError):
        value = msgspec.convert(value, setting.kind)
    check_value(setting.name, value, setting.kind, setting.range)
    return value


def _whole(path: str) -> str:
    """The path from any working folder, so that a run continues from anywhere."""
    return path if "://" in path else os.path.abspath(path)


def _rebuilt(config: Any, changes: Mapping[Sequence[str], Any], place: str = "") -> Any:
    """A nested dataclass (or dict) with the values at some paths replaced, all at once.

    Raises:
      ConfigError: a part of the configuration refuses them; the message says which (`place`).
    """
    inside: dict[str, dict[Sequence[str], Any]] = {}
    for (first, *rest), value in changes.items():
        inside.setdefault(first, {})[tuple(rest)] = value
    mapping = isinstance(config, dict)
    new = {}
    for name, parts in inside.items():
        old = config.get(name) if mapping else getattr(config, name)
        path = "" if place == "" and name in _GROUPS else f"{place}.{name}".removeprefix(".")
        new[name] = parts[()] if () in parts else _rebuilt(old, parts, path)
    if mapping:
        return {**config, **new}
    try:
        return dataclasses.replace(config, **new)
    except ValueError as error:
        raise ConfigError(f"{place}: {one_line(error)}".removeprefix(": ")) from error
