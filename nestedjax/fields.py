"""What a field of a configuration may hold: said once, in its annotation, and checked when one is
made.

    heads: Count
    clip: Positive | None
    decay_bias: Annotated[float, Range(-30, 30)]
"""

import functools
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from nestedjax.errors import ConfigError, shown

INT32 = 2**31 - 1  # JAX counts in int32
FLOAT32 = 3.4e38  # what is larger is infinite once JAX has it


class Range(NamedTuple):
    """The values of a number. None of them is infinite or nan.

    Attributes:
      low: the least.
      high: the greatest.
      without: a bound that does not belong to the range itself.
    """

    low: int | float
    high: int | float = FLOAT32
    without: Literal["", "low", "high"] = ""

    def problem(self, value: int | float) -> str:
        """What a value must be that it is not; "" inside the range.

        Example:
          >>> Count = Range(1, 8)
          >>> Count.problem(0), Count.problem(8)
          ('at least 1', '')
        """
        if isinstance(value, float) and not math.isfinite(value):
            return f"a finite number, {self}"
        low, high = self._bounds()
        if value < self.low or (self.without == "low" and value == self.low):
            return low
        return high if value > self.high or (self.without == "high" and value == self.high) else ""

    def _bounds(self) -> tuple[str, str]:
        low = f"{'more than' if self.without == 'low' else 'at least'} {_plain(self.low)}"
        return low, f"{'less than' if self.without == 'high' else 'at most'} {_plain(self.high)}"

    def __str__(self) -> str:
        low, high = self._bounds()
        return low if self.high in (INT32, FLOAT32) else f"{low} and {high}"


Count = Annotated[int, Range(1, INT32)]
Steps = Annotated[int, Range(0, INT32)]
Positive = Annotated[float, Range(0, without="low")]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, without="high")]
Heads = Annotated[int, Range(1, 2**16)]  # some mixers make one number for each
Taps = Annotated[int, Range(0, 128)]  # of a convolution, whose loop over them is unrolled
RotaryBase = Annotated[float, Range(1)]


def check_fields(config: Any) -> None:
    """Refuse a configuration with a field that is not what its annotation says.

    Args:
      config: a dataclass; those inside it check themselves.

    Raises:
      ConfigError: a value of another type, one that is not on the menu of a `Literal`, or a number
        outside its `Range`.
    """
    for name, kind in hints(type(config)).items():
        check_value(name, getattr(config, name), kind, range_of(kind))


def check_value(name: str, value: Any, kind: Any, bounds: Range | None = None) -> None:
    """Refuse a value of another type than `kind`, or a number (or several) out of bounds.

    Raises:
      ConfigError: one line with the name, the value, and what it must be.

    Example:
      >>> check_value("clip", -1.0, float | None, Range(0, without="low"))
      Traceback (most recent call last):
      nestedjax.errors.ConfigError: clip=-1.0 must be more than 0, or none
    """
    if not _fits(value, kind):
        raise ConfigError(f"{name}={shown(value)} must be {meaning(kind)}")
    problems = (bounds.problem(number) for number in _numbers(value)) if bounds else iter(())
    if problem := next(filter(None, problems), ""):
        each = ": each" if isinstance(value, tuple) else ""
        other = ", or none" if type(None) in _parts(kind) else ""
        raise ConfigError(f"{name}={shown(value)}{each} must be {problem}{other}")


def hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, ranges among them."""
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    found = typing.get_type_hints(cls, include_extras=True)
    return {name: found[name] for name in cls.__dataclass_fields__}


def range_of(kind: Any) -> Range | None:
    """The range that an annotation states, of a number or of each of several."""
    own = (part for part in getattr(kind, "__metadata__", ()) if isinstance(part, Range))
    inner = (range_of(part) for part in typing.get_args(kind))
    return next(own, None) or next(filter(None, inner), None)


def meaning(kind: Any) -> str:
    """What a value of a type is, in words.

    Example:
      >>> meaning(int | None), meaning(Literal["a", "b"])
      ('a whole number or none', 'one of a, b')
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return meaning(args[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a tuple, each part {meaning(args[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(meaning, args))
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
    }
    words |= {type(None): "none", dict: "a mapping"}
    return words.get(origin or kind, getattr(kind, "__name__", str(kind)))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has a type; True and False are no numbers."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _fits(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in args)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in args)
    if origin is tuple and args[1:] == (...,):
        return isinstance(value, tuple) and all(_fits(part, args[0]) for part in value)
    if kind in (int, float):
        wanted = int if kind is int else int | float
        return isinstance(value, wanted) and not isinstance(value, bool)
    whole = origin or kind
    return isinstance(value, whole) if isinstance(whole, type) and kind is not Any else True


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def _parts(kind: Any) -> tuple[Any, ...]:
    """The types of a union, also of each of several."""
    inner = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
    return typing.get_args(inner)


def _plain(bound: int | float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
