"""One command: cyclopts reads its flags, and its mistakes become one line."""

import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter
from cyclopts.help import HelpPanel, PlainFormatter
from rich.console import Console, ConsoleOptions

from nestedjax.errors import near
from nestedjax.fields import meaning
from nestedjax.fields import shown as literal

# What others call our flags -> what they are called here.
ALSO_CALLED = {
    "--files": "--data",
    "--lr": "--learning-rate",
    "--wd": "--weight-decay",
    "--bs": "--batch",
    "--batch-size": "--batch",
    "--seq-len": "--length",
    "--seq-length": "--length",
    "--sequence-length": "--length",
    "--context-length": "--length",
    "--max-steps": "--steps",
    "--num-steps": "--steps",
    "--iterations": "--steps",
    "--epochs": "--steps",
    "--eval-every": "--validate-every",
    "--save-every": "--checkpoint-every",
    "--grad-clip": "--clip",
    "--warmup-steps": "--warmup",
    "--d-model": "--width",
    "--hidden-size": "--width",
    "--n-layers": "--layers",
    "--num-layers": "--layers",
    "--depth": "--layers",
    "--vocab-size": "--vocab",
    "--precision": "--dtype",
    "--out": "--run",
    "--output": "--run",
    "--dir": "--run",
    "--max-tokens": "--tokens",
    "--max-new-tokens": "--tokens",
}
MANY = (1, 100_000)  # values of a flag that takes several; none at all is a mistake
Hint = Callable[[str], str | None]


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
    prog: str,
    function: Callable[..., Any],
    argv: Sequence[str],
    *,
    about: str,
    example: str,
    hint: Hint = lambda flag: None,
) -> Callable[[], Any] | None:
    """Read the arguments of a command.

    Args:
      prog: `nestedjax COMMAND`, and a preset if there is one.
      function: takes them by its signature; its docstring says what they mean.
      argv: the arguments.
      about: what the command does, for `--help`.
      example: printed below the flags.
      hint: what to say of an unknown flag; None for the names near to it.

    Returns:
      A call of the function, or None if `--help` was asked for and printed.

    Raises:
      UsageError: a flag or value that does not exist.
    """
    app = _app(prog, about=about, help_epilogue=f"example:\n{example}")
    app.default(_strict(function))
    try:
        if {"--help", "-h"} & {*argv}:
            app["--help"].show = False  # type: ignore[misc]
            app.help_print([])
            return None
        _, bound, _ = app.parse_args(list(argv), exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        raise UsageError(_sentence(error, hint)) from error
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
        default_parameter=Parameter(consume_multiple=MANY, negative=(), show_default=shown),
        **options,
    )


def _strict(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with whole numbers that are read as such: the library rounds 2.7 to 3."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    parameters = [
        p.replace(annotation=_whole_numbers(p.annotation)) for p in signature.parameters.values()
    ]
    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__doc__ = function.__doc__
    return called


def _whole_numbers(kind: Any) -> Any:
    """A type with a converter of our own at every int in it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is int:
        return Annotated[int, Parameter(converter=_whole)]
    if origin is Annotated:
        return Annotated[(_whole_numbers(args[0]), *args[1:])]
    if origin in (typing.Union, types.UnionType):
        if {*args} == {int, type(None)}:  # the converter then stands for the whole of it
            return Annotated[int, Parameter(converter=_whole_or_none)] | None
        return typing.Union[tuple(map(_whole_numbers, args))]  # noqa: UP007
    if origin is tuple:
        return tuple[tuple(p if p is ... else _whole_numbers(p) for p in args)]  # type: ignore[misc]
    return kind


def _whole(kind: Any, tokens: Sequence[Any]) -> int:
    del kind
    return int(tokens[0].value)


def _whole_or_none(kind: Any, tokens: Sequence[Any]) -> int | None:
    return None if tokens[0].value.lower() in ("none", "null") else _whole(kind, tokens)


def shown(value: Any) -> str:
    """A value as one would write it behind its flag."""
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("\n", "\\n")


def _sentence(error: cyclopts.CycloptsError, hint: Hint = lambda flag: None) -> str:
    """The error on one line, with the value and what is expected, or the nearest names."""
    token, argument = getattr(error, "token", None), error.argument
    if isinstance(error, cyclopts.UnknownOptionError) and token is not None:
        flag = token.keyword or token.value
        return f"no flag {_text(flag)}; {hint(flag) or _near(flag, error)}"
    if isinstance(error, cyclopts.RepeatArgumentError) and token is not None:
        return f"{token.keyword} is said twice, or its opposite is: give it once"
    if isinstance(error, cyclopts.CoercionError) and token is not None and argument is not None:
        kind = _one(argument.field_info.annotation)
        return f"{token.keyword} {_text(token.value)}: expected {meaning(kind)}"
    if isinstance(error, cyclopts.MissingArgumentError) and argument is not None:
        name = argument.names[0]
        count = argument.token_count()[0]
        needs = "a value" if count < 2 else f"{count} values"
        return f"{name} needs {needs}" if name.startswith("-") else f"{name} is missing"
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return f"unexpected {_text(' '.join(error.unused_tokens or ()))}"
    return " ".join(str(error).split())


def _text(given: str) -> str:
    """What was given, as it was if that is one short line."""
    return given if given.strip() and given.isprintable() and len(given) < 100 else literal(given)


def _one(kind: Any) -> Any:
    """The type of one value, where a flag takes one or several or none."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Annotated, tuple):
        return _one(args[0])
    several = [part for part in args if typing.get_origin(part) is tuple]
    return _one(several[0]) if several else kind


def _near(flag: str, error: cyclopts.UnknownOptionError) -> str:
    """What may have been meant by a flag that does not exist."""
    known = [name for a in error.argument_collection or () for name in a.names]
    also = ALSO_CALLED.get(flag.replace("_", "-").lower())
    found = f"did you mean {also}?" if also in known else near(flag, known)
    return found if found.startswith("did") else "--help lists all of them"
