"""The error of a setting that the caller can fix, and words for it; imports nothing slow."""

import difflib
import math
import numbers
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that the caller can fix; the message is one line with the fix."""


class RunWarning(UserWarning):
    """Something about a run that its owner should know, on one line; the run goes on."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(value: object) -> str:
    """A value for a message of one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not write a whole number of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def at_least(name: str, value: int | None, least: int) -> None:
    """Refuse a setting below a bound; None passes.

    Raises:
      ConfigError: it is below.
    """
    if value is not None and value < least:
        raise ConfigError(f"{name}={value} must be at least {least}; give a larger number")


def require_range(
    name: str,
    value: object,
    low: int | float,
    high: int | float = math.inf,
    *,
    closed: str = "both",
    integer: bool = False,
) -> None:
    """Refuse a number outside of its range, or what is no number; an infinite end is never in it.

    Args:
      name: who takes it and what it is called, such as "omega: window".
      value: what was given.
      low: the lower end.
      high: the upper end.
      closed: which ends belong to the range: "both", "left", "right" or "neither".
      integer: whether only integers are in it.

    Raises:
      ConfigError: it is not in the range; with its name, value and range.

    Example:
      >>> require_range("decay", 0.5, 0, 1)
      >>> require_range("huber: threshold", 0.0, 0, closed="neither")
      Traceback (most recent call last):
      ...
      nestedjax.errors.ConfigError: huber: threshold=0.0 must be a number in (0, inf)
    """
    kind = numbers.Integral if integer else numbers.Real
    above = closed in ("both", "left") and low > -math.inf
    below = closed in ("both", "right") and high < math.inf
    if isinstance(value, kind) and not isinstance(value, bool):
        number = float(value)
        over = number >= low if above else number > low
        if over and (number <= high if below else number < high):
            return
    what = "an integer" if integer else "a number"
    ends = f"{'[' if above else '('}{low}, {high}{']' if below else ')'}"
    raise ConfigError(f"{name}={value!r} must be {what} in {ends}")


def near(name: str, known: Iterable[str]) -> str:
    """A hint at the names that come near to an unknown one, or else at all of them.

    Example:
      >>> near("lenght", ["length", "batch"])
      'did you mean length?'
      >>> near("x", ["length", "batch"])
      'there are batch, length'
      >>> near("--run", ["--use", "--json"])  # dashes make no flag alike
      'there are --json, --use'
    """
    names = sorted(known)
    bare = {n.lstrip("-"): n for n in names}
    close = difflib.get_close_matches(name.lstrip("-"), list(bare), n=3, cutoff=0.6)
    close = [bare[n] for n in close]
    close = close or [n for n in names if name and name in n][:3]
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"
