"""The error of a setting that the caller can fix, and words for it; imports nothing slow."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that the caller can fix; the message is one line with the fix."""


class RunWarning(UserWarning):
    """Something about a run that its owner should know, on one line; the run goes on."""


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
