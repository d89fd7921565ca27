"""Values of settings from text (on its way out: a library does this next)."""

import types
import typing
from typing import Any, Literal, Union

from nestedjax.errors import ConfigError

NONE = type(None)


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
