"""Settings by name: reading and changing nested frozen dataclasses with types checked.

A setting is named by its path, such as `cms.periods`; its type is that of the dataclass field.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

NONE = type(None)


class ConfigError(ValueError):
    """A setting that the caller can fix; the message is one line with the fix."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def at_least(name: str, value: int | None, least: int) -> None:
    """Refuse a setting below a bound; None passes.

    Raises:
      ConfigError: it is below.
    """
    if value is not None and value < least:
        raise ConfigError(f"{name}={value} must be at least {least}; give a larger number")


def near(name: str, known: Iterable[str]) -> str:
    """A hint at the names that come near to an unknown one, or else at all of them.

    Example:
      >>> near("lenght", ["length", "batch"])
      'did you mean length?'
      >>> near("x", ["length", "batch"])
      'there are batch, length'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    close = close or [n for n in names if name and name in n][:3]
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"


def settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Path of each setting -> its value, nested dataclasses opened up.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Inner:
      ...     size: int = 3
      >>> @dataclasses.dataclass(frozen=True)
      ... class Outer:
      ...     inner: Inner = Inner()
      ...     name: str = "a"
      >>> settings(Outer())
      {'inner.size': 3, 'name': 'a'}
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= settings(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


def replace(config: Any, path: str, text: str) -> Any:
    """The configuration with one setting read from text.

    Args:
      config: a frozen dataclass.
      path: of the setting, one of `settings(config)`.
      text: its new value.

    Raises:
      ConfigError: the text is no value of the setting's type, or the configuration refuses it.
    """
    name, _, rest = path.partition(".")
    if rest:
        value = replace(getattr(config, name), rest, text)
    else:
        value = parse(typing.get_type_hints(type(config))[name], text, path)
    try:
        return dataclasses.replace(config, **{name: value})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def parse(kind: Any, text: str, name: str) -> Any:
    """A value of a type from text.

    Args:
      kind: bool, int, float, str, None, a `Literal`, a union, or `tuple[kind, ...]`.
      text: such as `3`, `1e-3`, `true`, `none`, or `64,256,none` for a tuple.
      name: of the setting, for the message.

    Raises:
      ConfigError: the text is none.

    Example:
      >>> parse(tuple[int | None, ...], "64,256,none", "cms.periods")
      (64, 256, None)
    """
    try:
        return _parse(kind, text.strip())
    except ValueError:
        message = f"{name}={text} is not {_meaning(kind)}; give --set {name}={_example(kind)}"
        raise ConfigError(message) from None


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as what JSON holds."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass back from `to_dict` or its JSON; settings that are missing take their defaults.

    Raises:
      ConfigError: a setting that is not known, is missing without a default, or is refused.
    """
    hints = typing.get_type_hints(cls)
    return construct(cls, {n: _from_json(hints.get(n), value) for n, value in values.items()})


def construct(cls: type, values: Mapping[str, Any]) -> Any:
    """`cls(**values)`, with every refusal a `ConfigError`."""
    names = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; {near(unknown[0], names)}")
    required = [
        name
        for name, field in names.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"the setting {missing[0]!r} is missing; add it")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def _from_json(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value)
    return tuple(_from_json(None, part) for part in value) if isinstance(value, list) else value


def _parse(kind: Any, text: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if text not in args:
            raise ValueError
        return text
    if origin in (Union, types.UnionType):
        for part in args:
            try:
                return _parse(part, text)
            except ValueError:
                continue
        raise ValueError
    if origin is tuple:
        parts = [part for part in text.strip("()").split(",") if part.strip()]
        return tuple(_parse(args[0], part.strip()) for part in parts)
    if kind in (bool, NONE):
        words = {"true": True, "false": False} if kind is bool else {"none": None}
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    raise TypeError(f"no reader for settings of type {kind}")


def _meaning(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list, each {_meaning(args[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_meaning, args))
    words = {int: "a whole number", float: "a number", bool: "true or false", NONE: "none"}
    return words.get(kind, "text")


def _example(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return f"{_example(args[0])},{_example(args[0])}"
    if args:
        return str(args[0]) if origin is Literal else _example(args[0])
    return {int: "64", float: "0.001", bool: "true", NONE: "none"}.get(kind, "text")
