"""The range of every number that an optimizer takes, stated once: in the type of the argument."""

import functools
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Range(NamedTuple):
    """Finite numbers between two bounds, which belong to it unless they are said not to.

    An argument says its range in its type: `b1: Annotated[Number, Range(0, 1, below=True)]`, and
    the function that takes it is decorated with `checked`.

    Attributes:
      low: lower bound.
      high: upper bound.
      above: whether the lower bound itself is excluded.
      below: whether the upper bound itself is excluded.
      integer: whether the numbers are integers that are known when compiling.

    Example:
      >>> str(Range(0, 1, below=True)), str(Range(0)), str(Range(1, integer=True))
      ('at least 0 and less than 1', 'at least 0 and finite', 'an integer >= 1')
      >>> Range(0, 1, below=True).check("b1", 2.0)
      Traceback (most recent call last):
        ...
      ValueError: b1=2.0 must be at least 0 and less than 1
    """

    low: Any = -math.inf
    high: Any = math.inf
    above: bool = False
    below: bool = False
    integer: bool = False

    def __str__(self) -> str:
        """The range in words."""
        if self.integer:
            return f"an integer >= {self.low}"
        parts = []
        if self.low != -math.inf:
            parts.append(f"{'more than' if self.above else 'at least'} {self.low}")
        if self.high == math.inf:
            parts.append("finite")
        else:
            parts.append(f"{'less than' if self.below else 'at most'} {self.high}")
        return " and ".join(parts)

    def check(self, name: str, value: Any) -> None:
        """Refuse a value outside; a tuple is checked entry by entry.

        None, and whatever is no number, passes; so does an array that is being traced (as under
        `optax.inject_hyperparams` inside of `jax.jit`), whose value is not known.

        Raises:
          ValueError: the value is outside of the range.
        """
        if isinstance(value, tuple | list):
            for one in value:
                self.check(name, one)
        elif self.integer:
            self._check_integer(name, value)
        elif not self._holds(value):
            raise ValueError(f"{name}={value} must be {self}")

    def _check_integer(self, name: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(
                f"{name}={value!r} must be {self}, known when compiling; with"
                " optax.inject_hyperparams name it in static_args"
            )
        if not self.low <= value <= self.high:
            raise ValueError(f"{name}={value} must be {self}")

    def _holds(self, value: Any) -> bool:
        if value is None or callable(value) or isinstance(value, str):
            return True
        try:
            number = float(value)
        except (TypeError, ValueError):  # traced, or no number
            return True
        low = self.low < number if self.above else self.low <= number
        high = number < self.high if self.below else number <= self.high
        return low and high and math.isfinite(number)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, refusing arguments that are outside of the ranges that their types say.

    Raises (when called):
      ValueError: an argument is, with its name, its value and its range.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the function's own error says which argument, and of what
            given = {}
        for name, range_ in ranges_of(function).items():
            if name in given:
                range_.check(name, given[name])
        return function(*args, **kwargs)

    return call


@functools.cache
def ranges_of(function: Callable[..., Any]) -> dict[str, Range]:
    """Argument -> its range, for the arguments that have one."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {name: _range(hint) for name, hint in hints.items() if name != "return"}
    return {name: range_ for name, range_ in found.items() if range_ is not None}


def _range(hint: Any) -> Range | None:
    """The range in a type: of a number, of None or a number, or of the entries of a tuple."""
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, Range):
            return part
    inside = (_range(part) for part in typing.get_args(hint))
    return next((found for found in inside if found is not None), None)
