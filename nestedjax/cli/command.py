"""One command: cyclopts reads its flags, and its mistakes become one line."""

import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import cyclopts
from cyclopts import App, Parameter
from cyclopts.help import HelpPanel, PlainFormatter
from rich.console import Console, ConsoleOptions

from nestedjax.errors import near


class UsageError(ValueError):
    """A mistake in the arguments of a command; one line."""


class _Formatter(PlainFormatter):
    """Help as plain text: each flag with its default on one line, what it means below."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        if not panel.entries:
            return
        lines = [f"{panel.title}:"]
        for entry in panel.entries:
            default = "" if entry.default is None else f"  [{entry.default}]"
            wide = Console(width=10_000, color_system=None)
            with wide.capture() as captured:
                wide.print(entry.description or "", end="", markup=False)
            doc = captured.get().strip()
            if entry.choices:
                doc = f"{doc} One of {', '.join(entry.choices)}."
            lines.append(f"  {', '.join(entry.display_labels_with_metavar)}{default}")
            lines += textwrap.wrap(
                doc, console.width, initial_indent=" " * 8, subsequent_indent=" " * 8
            )
        console.print("\n".join(lines), "", sep="\n", markup=False, soft_wrap=True)


def parse(
    prog: str, function: Callable[..., Any], argv: Sequence[str], *, about: str, example: str
) -> Callable[[], Any] | None:
    """Read the arguments of a command.

    Args:
      prog: `nestedjax COMMAND`, and a preset if there is one.
      function: takes them by its signature; its docstring says what they mean.
      argv: the arguments.
      about: what the command does, for `--help`.
      example: printed below the flags.

    Returns:
      A call of the function, or None if `--help` was asked for and printed.

    Raises:
      UsageError: a flag or value that does not exist.
    """
    app = _app(prog, about=about, help_epilogue=f"example:\n{example}")
    app.default(function)
    try:
        if {"--help", "-h"} & {*argv}:
            app["--help"].show = False  # type: ignore[misc]
            app.help_print([])
            return None
        _, bound, _ = app.parse_args(list(argv), exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        raise UsageError(_sentence(error)) from error
    return partial(function, *bound.args, **bound.kwargs)


def given(function: Callable[..., Any], argv: Sequence[str]) -> dict[str, Any]:
    """Those arguments that a function takes, out of more of them, by name.

    Raises:
      UsageError: one of them has no value, or one of another type.
    """
    app = _app("nestedjax", about="", help_flags=[])
    app.default(function)
    try:
        _, bound, _, _ = app.parse_known_args(list(argv))
    except cyclopts.CycloptsError as error:
        raise UsageError(_sentence(error)) from error
    return dict(bound.arguments)


def _app(prog: str, *, about: str, **options: Any) -> App:
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    return App(
        name=prog,
        usage=f"{prog} [FLAGS]",
        help=about,
        help_format="plaintext",
        help_formatter=_Formatter(),
        version_flags=[],
        console=Console(width=width, highlight=False),
        default_parameter=Parameter(consume_multiple=True, negative=(), show_default=shown),
        **options,
    )


def shown(value: Any) -> str:
    """A value as one would write it behind its flag."""
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("\n", "\\n")


def _sentence(error: cyclopts.CycloptsError) -> str:
    """The error on one line, with the value and what is expected, or the nearest names."""
    token, argument = getattr(error, "token", None), error.argument
    if isinstance(error, cyclopts.UnknownOptionError) and token is not None:
        known = [name for a in error.argument_collection or () for name in a.names]
        hint = near(token.keyword, known)
        hint = hint if hint.startswith("did") else "--help lists all of them"
        return f"no flag {token.keyword}; {hint}"
    if isinstance(error, cyclopts.CoercionError) and token is not None and argument is not None:
        kind = typing.get_args(argument.field_info.annotation)[0]
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        return f"{token.keyword} {token.value}: expected {meaning(kind)}"
    if isinstance(error, cyclopts.MissingArgumentError) and argument is not None:
        name = argument.names[0]
        count = argument.token_count()[0]
        needs = "a value" if count < 2 else f"{count} values"
        return f"{name} needs {needs}" if name.startswith("-") else f"{name} is missing"
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return f"unexpected {' '.join(error.unused_tokens or ())}"
    return " ".join(str(error).split())


def meaning(kind: Any) -> str:
    """What text stands for a value of a type, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return meaning(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(meaning, args))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "none" if kind is type(None) else getattr(kind, "__name__", str(kind)))
