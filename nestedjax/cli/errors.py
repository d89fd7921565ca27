"""Turning what the caller can fix into one line and an exit code."""

import os
import sys
import warnings
from collections.abc import Callable

from nestedjax.cli.output import say

FAILED, FIX, INTERRUPTED = 1, 2, 130


def guarded(command: str, run: Callable[[], int]) -> int:
    """Run a command; an error that the caller can fix becomes one line on standard error.

    Args:
      command: its name.
      run: returns the exit code.
    """
    from nestedjax.checkpoint import CheckpointError, SaveError
    from nestedjax.data import DataError
    from nestedjax.errors import ConfigError, RunWarning, one_line
    from nestedjax.sharding import MeshError
    from nestedjax.training import TrainingError

    shown, told = warnings.showwarning, set[str]()

    def show(message, category, *args, **options):
        if issubclass(category, RunWarning):
            line = f"nestedjax {command}: warning: {one_line(message)}"
            if line not in told:  # the same file may be read for several purposes
                say(line, error=True)
            told.add(line)
        else:
            shown(message, category, *args, **options)

    def failed(error: BaseException, code: int) -> int:
        say(f"nestedjax {command}: {one_line(error)}", error=True)
        return code

    with warnings.catch_warnings():
        warnings.simplefilter("always", RunWarning)
        warnings.showwarning = show
        try:
            return run()
        except (TrainingError, SaveError) as error:
            return failed(error, FAILED)
        except (ConfigError, DataError, CheckpointError, MeshError) as error:
            return failed(error, FIX)
        except KeyboardInterrupt:
            return failed(KeyboardInterrupt("interrupted"), INTERRUPTED)
        except BrokenPipeError:  # who reads standard output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (RuntimeError, AssertionError) as error:
            if _has_device():
                raise
            why = f" ({error})" if str(error) else ""
            return failed(ConfigError(f"JAX finds no device{why}; {_platform_fix()}"), FIX)


def _has_device() -> bool:
    import jax

    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):  # an assertion where no plugin for it is installed
        return False


def _platform_fix() -> str:
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked:
        return "set JAX_PLATFORMS=cpu"
    return f"JAX_PLATFORMS={asked} asks for it: unset it, or set JAX_PLATFORMS=cpu"
