"""Printing that no stream can stop: what cannot be shown is lost, and the command goes on."""

import os
import sys
from contextlib import suppress
from typing import TextIO


def say(text: str, *, error: bool = False) -> None:
    """Print a line.

    A character that the stream's encoding lacks is shown as a question mark. A stream that is
    closed (`| head`, a terminal that is gone) or has no room gets nothing from then on.

    Args:
      text: the line.
      error: on standard error.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
    except (OSError, ValueError):
        _silence(stream)


def _silence(stream: TextIO) -> None:
    """Let what is buffered, and all that comes, go nowhere; else the end of the process fails."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
