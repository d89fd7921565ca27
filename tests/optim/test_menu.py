"""The menu: the arguments of every optimizer are typed, documented and checked."""

import inspect
import typing
from typing import Any, Literal

import pytest

from nestedjax import optim
from nestedjax.optim import menu

ARGUMENTS = [(name, a) for name in menu.OPTIMIZERS for a in menu.arguments(name).values()]
every_argument = pytest.mark.parametrize(
    ("name", "argument"), ARGUMENTS, ids=lambda value: value if isinstance(value, str) else value[0]
)
# Given to the optimizer as objects, or by whoever makes it.
CONTEXT = {"learning_rate", "weight_decay", "axes", "rest", "mask"}


@every_argument
def test_an_argument_is_documented_and_its_default_is_of_its_type(name, argument):
    assert argument.doc.endswith(".") and len(argument.doc) > 10, argument.doc
    optimizer = menu.make(name, 1e-3, given={argument.name: argument.default})
    assert callable(optimizer.update)


@every_argument
def test_a_value_of_another_type_is_refused(name, argument):
    for value in ("nonsense", object(), [1.0]):
        with pytest.raises(ValueError, match=f"{argument.name}=.* is not "):
            menu.make(name, 1e-3, given={argument.name: value})


def test_types_are_what_a_command_line_can_read():
    found = {(name, a.name): a.type for name, a in ARGUMENTS}
    assert found["m3", "period"] == int | tuple[int, ...]
    assert found["m3", "slow_weight"] == float | tuple[float, ...]
    assert found["m3", "cache"] is bool
    assert found["shampoo", "b2"] == float | None
    assert found["deep_momentum", "width"] == int | None
    assert found["deep_momentum", "architecture"] == Literal["mlp", "linear", "keyless"]
    assert found["nonlinear_momentum", "scale"] == Literal["rms", "jordan"] | None
    assert found["adamw", "eps"] is float
    assert not CONTEXT & {argument for _, argument in found}


@pytest.mark.parametrize("name", menu.OPTIMIZERS)
def test_every_argument_of_a_signature_is_settable_or_known_as_context(name):
    """Nothing is left out of the menu because its type was not understood."""
    signature = {*inspect.signature(menu.OPTIMIZERS[name]).parameters}
    assert signature - CONTEXT == {*menu.arguments(name)}


@pytest.mark.parametrize(
    "function",
    [getattr(optim, name) for name in optim.__all__ if inspect.isfunction(getattr(optim, name))],
    ids=lambda function: function.__name__,
)
def test_public_signatures_say_their_types(function):
    hints = typing.get_type_hints(function)
    missing = [n for n in inspect.signature(function).parameters if hints.get(n, Any) is Any]
    assert not missing and "return" in hints


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="no optimizer 'm4'; there are adamw, adamuon"):
        menu.arguments("m4")
    with pytest.raises(ValueError, match="m3 has no argument 'beta'; its arguments are b1, b2, b3"):
        menu.make("m3", 1e-3, given={"beta": 1.0})
    with pytest.raises(ValueError, match="accumulate='x' is not one of ema, sum"):
        menu.make("m3", 1e-3, given={"accumulate": "x"})
    with pytest.raises(ValueError, match="period=True is not a whole number or several of which"):
        menu.make("m3", 1e-3, given={"period": True})
    with pytest.raises(ValueError, match="b1=7.0 must be at least 0 and less than 1"):
        menu.make("m3", 1e-3, given={"b1": 7.0})
