"""Text for terminals, pipes and files."""

import re
import sys
from typing import Any

# What a terminal obeys: C0 but for new lines and tabs, DEL, C1; and what turns the direction of the
# text behind it (embeddings, overrides and isolates; marks such as U+200F are part of text).
_OBEYED = re.compile("\r\n|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str, stream: Any = None) -> str:
    r"""Text as it can be written to a stream.

    A terminal gets `\x1b` in place of the control character, which an untrained model draws and
    terminals obey. A pipe or file gets the text as it is.

    Args:
      text: to be written.
      stream: where to, a text stream; default standard output.
    """
    stream = sys.stdout if stream is None else stream
    return _OBEYED.sub(_escaped, text) if stream is not None and stream.isatty() else text


def escape_what_cannot_be_encoded() -> None:
    r"""Have standard output write `\u20ac` for a character that its encoding does not have.

    Standard error does so anyway; standard output would end the command.
    """
    change = getattr(sys.stdout, "reconfigure", None)  # a stream in its place may have none
    if change is not None:
        change(errors="backslashreplace")


def _escaped(found: re.Match[str]) -> str:
    text = found[0]
    return text if text == "\r\n" else text.encode("unicode_escape").decode()
