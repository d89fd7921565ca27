"""The settings of a run as flags: each typed, documented, and with its value as the default."""

import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from cyclopts import Group, Parameter

from nestedjax import models, optim, run
from nestedjax.cli.command import UsageError, given, parse
from nestedjax.errors import ConfigError
from nestedjax.run import RunConfig, Setting

NAMES = {"files": "--data"}  # settings whose flag has another name
NEGATIVES = {"writes": "--without-writes"}  # switches whose flag to turn them off has another name
WORDS = {  # how help names the values of a type, where the library forgets that none is one
    int | None: "INT|none",
    float | None: "FLOAT|none",
    str | None: "TEXT|none",
    str: "TEXT",
    tuple[int | None, ...]: "INT|none ...",
    tuple[float | None, ...]: "FLOAT|none ...",
}
SIMPLE = (int, float, bool, str, type(None))
Modules = Annotated[
    tuple[str, ...],
    Parameter(
        "--import",
        consume_multiple=False,  # what follows may be the preset
        help="module to import, for models of your own; may be given several times",
    ),
]


class Named(NamedTuple):
    """What the arguments of a command name, and the others.

    Attributes:
      name: of a preset or a run folder; None if there is none.
      rest: the other arguments.
      early: those that decide which flags there are: run, config, import, optimizer.
    """

    name: str | None
    rest: list[str]
    early: dict[str, Any]


def named(argv: Sequence[str], *, folders: bool = False) -> Named:
    """Find the preset's name among the arguments, wherever it stands.

    Args:
      argv: the arguments of a command.
      folders: a run folder will do, too.

    Raises:
      UsageError, ConfigError: a flag that decides which flags there are has a wrong value.
    """
    early = given(_early, argv)
    for flag in ("run", "config"):
        if early.get(flag) == "":  # an unset variable of a shell, as in --run "$FOLDER"
            raise UsageError(f"--{flag} '': is empty; name one")
    import_modules(early.get("modules", ()))
    values = {flag for flag in ("--run", "--config", "--tokenizer", "--import", "--data", "--mesh")}
    values |= {"--optimizer", "--plot"}

    def names(at: int) -> bool:
        token = argv[at]
        found = token in models.PRESETS or (folders and os.path.isdir(token))
        return found and (at == 0 or argv[at - 1] not in values)

    first = 0 if argv and not argv[0].startswith("-") else None
    at = next((i for i in range(len(argv)) if names(i)), first)
    if at is None:
        return Named(None, list(argv), early)
    return Named(argv[at], [*argv[:at], *argv[at + 1 :]], early)


def _early(
    *,
    run: Annotated[str | None, Parameter("--run")] = None,
    config: Annotated[str | None, Parameter("--config")] = None,
    modules: Modules = (),
    optimizer: Annotated[str | None, Parameter("--optimizer")] = None,
) -> None:
    """The flags that decide which others there are."""


def import_modules(modules: Sequence[str]) -> None:
    """Import modules that the user names, also from the working folder."""
    if modules and "" not in sys.path:
        sys.path.insert(0, "")
    run.import_modules(modules)


def start(found: Named, *, text: bool = True) -> RunConfig:
    """The run that flags change: of a preset, or of another run's `config.json`.

    Args:
      found: the arguments.
      text: whether a preset is to read text, and its vocabulary is the tokenizer's therefore.

    Raises:
      ConfigError: there is no such preset, or the file cannot be read.
      UsageError: neither is named.
    """
    path = found.early.get("config")
    if path is not None:
        config = run.read_config(path, found.early.get("modules", ()))
        if found.name is not None and found.name != config.preset:
            raise ConfigError(f"{path} holds a {config.preset}, not a {found.name}; name one")
        return config
    if found.name is None:
        raise UsageError("PRESET is missing; name one, such as hope_nano")
    return run.run_preset(found.name, **({"files": ()} if text else {}))


def read(
    prog: str,
    own: Callable[..., Any],
    found: Named,
    config: RunConfig,
    *,
    about: str,
    example: str,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read the flags of a command that takes every setting of a run.

    Args:
      prog: `nestedjax COMMAND PRESET`.
      own: the command's own flags, as the signature and docstring of a function.
      found: the arguments, from `named`.
      config: the run whose settings they are; its values are the defaults.
      about: see `parse`.
      example: see `parse`.

    Returns:
      The command's own flags that were given, and the settings that were given, by name; None if
      help was asked for.
    """
    chosen = found.early.get("optimizer")
    if chosen in optim.menu.OPTIMIZERS:
        config = run.replaced(config, {"optimizer": chosen})
    if "--" in found.rest:
        raise UsageError("unexpected --; leave it out")
    settings = {
        n.replace(".", "__"): s for n, s in run.settings(config).items() if _is_flag(s.kind)
    }
    first = Group(f"{prog.split()[1]}", sort_key=-1)
    groups = {s.group: Group(s.group, sort_key=i) for i, s in enumerate(settings.values())}
    mine = [
        p.replace(annotation=Annotated[p.annotation, Parameter(group=first)])
        for p in inspect.signature(own).parameters.values()
    ]
    flags = [_parameter(key, s, groups[s.group]) for key, s in settings.items()]

    def collect(**given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        changes = {s.name: _single(s, given.pop(k)) for k, s in settings.items() if k in given}
        return given, changes

    collect.__signature__ = inspect.Signature([*mine, *flags])  # type: ignore[attr-defined]
    collect.__doc__ = own.__doc__
    hint = partial(_of_another_optimizer, config.optimizer.name)
    call = parse(prog, collect, found.rest, about=about, example=example, hint=hint)
    return None if call is None else call()


def _of_another_optimizer(chosen: str, flag: str) -> str | None:
    """What to say of an argument that the chosen optimizer does not have."""
    group, _, argument = flag.replace("-", "_").partition(".")
    if group != "__optimizer":
        return None
    have = [n for n in optim.menu.OPTIMIZERS if argument in optim.menu.arguments(n)]
    if have:
        return f"{chosen} does not have it; these do: {', '.join(have)} (--optimizer NAME)"
    return None


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A new run: one to start from, with settings changed."""
    known = run.settings(config)
    model = {n for n in changes if n in known and known[n].path[0] == "model"}
    of_model = {n: value for n, value in changes.items() if n in model}
    return run.run_preset(config, of_model, **{n: v for n, v in changes.items() if n not in model})


def _parameter(key: str, setting: Setting, group: Group) -> inspect.Parameter:
    flag = NAMES.get(setting.name, "--" + setting.name.replace("_", "-"))
    kind, more = _flag_type(setting.kind), dict[str, Any]()
    if kind is bool:
        path, dot, last = flag.removeprefix("--").rpartition(".")
        more["negative"] = NEGATIVES.get(setting.name, f"--{path}{dot}no-{last}")
    elif (word := WORDS.get(kind)) is not None:
        more["metavar"] = word
    doc = (
        setting.doc
        if setting.range is None
        else f"{setting.doc} {str(setting.range).capitalize()}."
    )
    how = Parameter(flag, help=doc, group=group, **more)
    return inspect.Parameter(
        key, inspect.Parameter.KEYWORD_ONLY, default=setting.value, annotation=Annotated[kind, how]
    )


def _is_flag(kind: Any) -> bool:
    """Whether text can hold a value of this type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return all(map(_is_flag, args))
    if origin is tuple:
        return len(args) == 2 and args[1] is ... and _is_flag(args[0])
    return origin is Literal or kind in SIMPLE


def _flag_type(kind: Any) -> Any:
    """The type as flags have it: one value or several are several, and "none" comes before text."""
    args = (
        typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ()
    )
    many = [part for part in args if typing.get_origin(part) is tuple]
    if many:
        inner = typing.get_args(many[0])[0]
        return tuple[inner | None, ...] if type(None) in args else many[0]  # type: ignore[valid-type]
    if str in args:
        return typing.Union[(*(a for a in args if a is not str), str)]  # noqa: UP007
    return kind


def _single(setting: Setting, value: Any) -> Any:
    """One value where the setting may have one or several."""
    union = typing.get_origin(setting.kind) in (typing.Union, types.UnionType)
    return value[0] if union and isinstance(value, tuple) and len(value) == 1 else value
