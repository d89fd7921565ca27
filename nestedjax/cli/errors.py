"""Turning what the caller can fix into one line and an exit code."""

import os
import sys
import warnings
from collections.abc import Callable

FAILED, FIX = 1, 2


def guarded(command: str, run: Callable[[], int]) -> int:
    """Run a command; an error that the caller can fix becomes one line on standard error.

    Args:
      command: its name.
      run: returns the exit code.
    """
    from nestedjax.checkpoint import CheckpointError, CheckpointWarning
    from nestedjax.data import DataError, DataWarning
    from nestedjax.errors import ConfigError, one_line
    from nestedjax.sharding import MeshError
    from nestedjax.training import TrainingError

    shown, told = warnings.showwarning, set[str]()

    def show(message, category, *args, **options):
        if issubclass(category, CheckpointWarning | DataWarning):
            line = f"nestedjax {command}: warning: {message}"
            if line not in told:  # the same file may be read for several purposes
                print(line, file=sys.stderr)
            told.add(line)
        else:
            shown(message, category, *args, **options)

    with warnings.catch_warnings():
        for category in (CheckpointWarning, DataWarning):
            warnings.simplefilter("always", category)
        warnings.showwarning = show
        try:
            return run()
        except (ConfigError, DataError, CheckpointError, MeshError) as error:
            print(f"nestedjax {command}: {one_line(error)}", file=sys.stderr)
            return FIX
        except TrainingError as error:
            print(f"nestedjax {command}: {one_line(error)}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            print(f"nestedjax {command}: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # who reads standard output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
