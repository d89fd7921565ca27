"""The optimizers by name, and their arguments as plain values: what a command line chooses from."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from nestedjax.optim.adamuon import adamuon
from nestedjax.optim.deep_momentum import deep_momentum
from nestedjax.optim.delta_momentum import delta_momentum
from nestedjax.optim.dgd import dgd
from nestedjax.optim.ggd import ggd
from nestedjax.optim.m3 import m3
from nestedjax.optim.matrices import Axes
from nestedjax.optim.nonlinear_momentum import nonlinear_momentum
from nestedjax.optim.parts import Rate
from nestedjax.optim.preconditioned_momentum import preconditioned_momentum
from nestedjax.optim.shampoo import shampoo
from nestedjax.optim.soap import soap

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
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
_CONTEXT = ("learning_rate", "weight_decay", "axes", "rest")


def arguments(name: str) -> dict[str, Any]:
    """The arguments of an optimizer that a number, a word or a list of numbers can be -> defaults.

    Raises:
      ValueError: there is no optimizer of that name.

    Example:
      >>> from nestedjax.optim import menu
      >>> menu.arguments("adamuon")["b2"]
      0.95
    """
    found = inspect.signature(_named(name)).parameters
    return {n: p.default for n, p in found.items() if n not in _CONTEXT}


def make(
    name: str,
    learning_rate: Rate,
    *,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
    given: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer by name, without weight decay.

    Args:
      name: one of `OPTIMIZERS`.
      learning_rate: a rate or schedule.
      axes: which parameters are matrices; see `m3`.
      rest: what steps the parameters that the rule does not; unused by rules for every parameter.
      given: values of its arguments.

    Raises:
      ValueError: no such optimizer or argument, with those that exist; or a value it refuses.

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
    context = {"axes": axes, "rest": rest, "weight_decay": 0.0}
    taken = inspect.signature(function).parameters
    return function(learning_rate, **{n: v for n, v in context.items() if n in taken}, **given)


def has_rest(name: str) -> bool:
    """Whether an optimizer leaves parameters to another one."""
    return "rest" in inspect.signature(_named(name)).parameters


def parse(name: str, argument: str, text: str) -> Any:
    """The value of an argument from text, of the kind that its default is.

    Args:
      name: of the optimizer.
      argument: one of `arguments(name)`.
      text: such as `3`, `5,20`, `1e-3`, `true`, `none`, or a word.

    Raises:
      ValueError: the text is of another kind.

    Example:
      >>> from nestedjax.optim import menu
      >>> menu.parse("m3", "period", "5,20"), menu.parse("m3", "b1", "0.9")
      ((5, 20), 0.9)
    """
    default, text = arguments(name)[argument], text.strip()
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        value = words[text.lower()]
        if isinstance(default, bool) == isinstance(value, bool):
            return value
    elif isinstance(default, str):
        return text
    elif not isinstance(default, bool):
        kind = int if isinstance(default, int) else float
        try:
            numbers = tuple(kind(part) for part in text.split(","))
            return numbers[0] if len(numbers) == 1 else numbers
        except ValueError:
            if default is None and text.isidentifier():
                return text
    raise ValueError(f"{argument}={text} is not of the kind of its default, {default}")


def _named(name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]
