"""The command line: `nestedjax COMMAND ...`, one module a command, imported when it is used.

Exit codes: 0 done; 1 training cannot go on (a number is not finite, a checkpoint cannot be written,
the run folder is gone); 2 something the caller can fix; both said in one line on standard error;
130, 143 or 129 stopped by Ctrl-C, SIGTERM or SIGHUP, with everything saved. Any other exception is
a bug and shows its traceback.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from nestedjax.cli.printing import escape_what_cannot_be_encoded
from nestedjax.version import __version__

# name -> module, and what the command does. A module has `main(argv)` that returns an exit code.
COMMANDS = {
    "train": ("nestedjax.cli.train", "train a model, or continue a run"),
    "eval": ("nestedjax.cli.eval", "loss, perplexity and bits per byte, by file and by position"),
    "generate": ("nestedjax.cli.generate", "continue a prompt"),
    "levels": ("nestedjax.cli.levels", "the nested system of a preset or run, slow to fast"),
    "bench": ("nestedjax.cli.bench", "what things cost: HOPE and its peers, every optimizer"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      argv: arguments without the program's name; default those of the process.

    Returns:
      The exit code.
    """
    if argv is None:
        _open_streams()
        _quiet_writes()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    escape_what_cannot_be_encoded()
    if name == "--version":
        print(f"nestedjax {__version__}")
        return 0
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        print(f"nestedjax: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    try:
        if argv is None:  # a program of its own, and not a call from one
            _prepare(name)
        return _run(name, arguments[1:])
    except KeyboardInterrupt:  # while modules are imported
        print(f"nestedjax {name}: interrupted", file=sys.stderr)
        return 130


def _run(name: str, arguments: list[str]) -> int:
    module = importlib.import_module(COMMANDS[name][0])

    from nestedjax.cli.command import UsageError

    try:
        return module.main(arguments)
    except UsageError as error:
        print(f"nestedjax {name}: {error}", file=sys.stderr)
        return 2


def _quiet_writes() -> None:
    """Hide what is left of a checkpoint's other writes once one of them has failed.

    Orbax closes their event loop; then tensorstore shows a traceback for each that ends, and Python
    warns of each that never began. The error itself is raised, and said in one line.
    """

    def show(found):
        trace = found.exc_traceback
        if trace is None or trace.tb_frame.f_code.co_name != "call_soon_threadsafe":
            sys.__unraisablehook__(found)

    sys.unraisablehook = show
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)


def _open_streams() -> None:
    """A standard stream that was closed (`>&-`) would become the first file that is opened."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _prepare(name: str) -> None:
    """What has to be set before JAX is imported by a command that computes."""
    if name in ("train", "eval", "generate", "bench"):
        from nestedjax.cli.allocator import keep_pages

        keep_pages()
    if name in ("train", "eval", "generate"):  # a benchmark says what compiling costs
        from nestedjax.cli.compile_cache import use_compile_cache

        use_compile_cache()


def _overview() -> str:
    lines = [f"  {name:10}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nestedjax COMMAND ...",
            "",
            "Nested Learning in JAX: train, evaluate and look into models of nested levels.",
            "",
            *lines,
            "",
            "nestedjax COMMAND --help says what a command takes, with an example;",
            "nestedjax --version says which version this is.",
        ]
    )
