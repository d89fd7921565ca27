"""The optimizers by name, and their arguments as plain values: what a command line chooses from."""

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union

import optax

from nestedjax.optim.adamuon import adamuon
from nestedjax.optim.adamw import adamw
from nestedjax.optim.deep_momentum import deep_momentum
from nestedjax.optim.delta_momentum import delta_momentum
from nestedjax.optim.dgd import dgd
from nestedjax.optim.ggd import ggd
from nestedjax.optim.m3 import m3
from nestedjax.optim.matrices import Axes
from nestedjax.optim.nonlinear_momentum import nonlinear_momentum
from nestedjax.optim.preconditioned_momentum import preconditioned_momentum
from nestedjax.optim.ranges import Range, ranges_of
from nestedjax.optim.shampoo import shampoo
from nestedjax.optim.soap import soap
from nestedjax.optim.types import LearningRate

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "adamw": adamw,
    "adamuon": adamuon,
    "deep_momentum": deep_momentum,
    "delta_momentum": delta_momentum,
    "dgd": dgd,
    "ggd": ggd,
    "m3": m3,
    "nonlinear_momentum": nonlinear_momentum,
    "preconditioned_momentum": preconditioned_momentum,
    "shampoo": shampoo,
    "soap": soap,
}
# Given by whoever makes the optimizer, not by its name.
_CONTEXT = ("learning_rate", "weight_decay", "mask", "axes", "rest")


class Argument(NamedTuple):
    """An argument of an optimizer that a plain value can be given for.

    Attributes:
      name: of the argument.
      type: int, float, bool, `Literal[...]`, `tuple[kind, ...]`, None, or a union of those.
      default: its value where it is not given.
      doc: what it means, from the optimizer's docstring.
      range: of its numbers; None where it takes none.
    """

    name: str
    type: Any
    default: Any
    doc: str
    range: Range | None = None


def arguments(name: str) -> dict[str, Argument]:
    """The settable arguments of an optimizer, by name, in the order of its signature.

    Arguments that only an object can be given for (functions, transformations) are left out; of a
    union with such an object the plain part is named.

    Raises:
      ValueError: there is no optimizer of that name.

    Example:
      >>> from nestedjax.optim import menu
      >>> argument = menu.arguments("m3")["period"]
      >>> argument.type, argument.default
      (int | tuple[int, ...], 20)
      >>> menu.arguments("adamw")["b2"].doc
      'decay of the second moment, in one step.'
      >>> str(menu.arguments("adamw")["b2"].range)
      'at least 0 and less than 1'
    """
    function = _named(name)
    hints, texts = typing.get_type_hints(function), _documented(inspect.getdoc(function) or "")
    ranges = ranges_of(function)
    found = {}
    for argument, parameter in inspect.signature(function).parameters.items():
        kind = None if argument in _CONTEXT else _plain(hints[argument])
        if kind not in (None, NoneType):
            found[argument] = Argument(
                argument, kind, parameter.default, texts[argument], ranges.get(argument)
            )
    return found


def make(
    name: str,
    learning_rate: LearningRate,
    *,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
    given: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer by name, without weight decay.

    Args:
      name: one of `OPTIMIZERS`.
      learning_rate: a number or a schedule.
      axes: which parameters are matrices; see `m3`.
      rest: the optimizer of the parameters that the rule leaves out; unused by rules for every
        parameter.
      given: values of its arguments; see `arguments`.

    Raises:
      ValueError: no such optimizer or argument, with those that exist; a value of another type, or
        one that the optimizer refuses.

    Example:
      >>> from nestedjax.optim import menu
      >>> tx = menu.make("m3", 1e-3, given={"period": 5})
    """
    function, known, given = _named(name), arguments(name), dict(given or {})
    unknown = sorted({*given} - {*known})
    if unknown:
        raise ValueError(
            f"{name} has no argument {unknown[0]!r}; its arguments are {', '.join(known)}"
        )
    for argument, value in given.items():
        if not _fits(known[argument].type, value):
            raise ValueError(f"{argument}={value!r} is not {_words(known[argument].type)}")
    context = {"axes": axes, "rest": rest, "weight_decay": 0.0}
    taken = inspect.signature(function).parameters
    return function(learning_rate, **{n: v for n, v in context.items() if n in taken}, **given)


def has_rest(name: str) -> bool:
    """Whether an optimizer leaves parameters to another one."""
    return "rest" in inspect.signature(_named(name)).parameters


def _named(name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def _plain(annotation: Any) -> Any:
    """The part of a type that plain values have; None where there is none."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, UnionType):
        kinds = [kind for kind in map(_plain, parts) if kind is not None]
        if float in kinds:  # which includes the whole numbers
            kinds = [kind for kind in kinds if kind is not int]
        return reduce(or_, dict.fromkeys(kinds)) if kinds else None
    if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        kind = _plain(parts[0])
        return None if kind is None else tuple[kind, ...]  # type: ignore[valid-type]
    if origin is Literal or annotation in (bool, int, float, NoneType):
        return annotation
    return None


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value has a type that `_plain` returns."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(parts[0], part) for part in value)
    if kind in (int, float):
        wanted = int if kind is int else int | float
        return isinstance(value, wanted) and not isinstance(value, bool)
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    """A type in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, parts))
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is tuple:
        return f"several of which each is {_words(parts[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "none")


def _documented(doc: str) -> dict[str, str]:
    """Argument -> its text in the section Args of a docstring."""
    section = re.search(r"^Args:\n((?:  .*\n|\n)+)", doc + "\n", re.MULTILINE)
    entries = re.split(r"^  (\w+): ", section.group(1), flags=re.MULTILINE) if section else [""]
    return {
        name: " ".join(text.split())
        for name, text in zip(entries[1::2], entries[2::2], strict=True)
    }
