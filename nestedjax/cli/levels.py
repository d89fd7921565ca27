"""The nested system of a preset or run, slow to fast: every box that learns, from what, by what
rule and how often, and the optimizer's own memories among them.

period: tokens between two writes (frozen: never; 0: solved anew for every query); of what the outer
optimizer writes, tokens of the training stream. frequency: writes per token. state bytes: for one
sequence; of the optimizer's memories, in total."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from nestedjax.cli.command import UsageError, parse
from nestedjax.cli.errors import guarded

EXAMPLE = """  nestedjax levels hope_nano
  nestedjax levels hope_nano --cms.periods 2048 4096 none none --plot levels.png
  nestedjax levels runs/first --json
"""


def options(
    *,
    json: bool = False,
    plot: str | None = None,
    config: str | None = None,
    modules: Annotated[tuple[str, ...], Parameter("--import")] = (),
) -> None:
    """The flags that are no settings.

    Args:
      json: print a JSON list of boxes.
      plot: also draw the system, as FILE.png.
      config: the config.json of a run whose system is shown.
      modules: modules to import, in which models of your own are.
    """


def main(argv: Sequence[str]) -> int:
    """`nestedjax levels`; returns the exit code."""
    return guarded("levels", lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    from nestedjax import models, run
    from nestedjax.cli import flags
    from nestedjax.errors import ConfigError, near

    found = flags.named(argv, folders=True)
    if found.name is None and "config" not in found.early:
        if not {"--help", "-h"} & {*argv}:
            raise UsageError("PRESET_OR_RUN is missing; name one, such as hope_nano")
        prog = "nestedjax levels PRESET_OR_RUN"
        parse(prog, options, argv, about=__doc__ or "", example=EXAMPLE)
        return 0
    saved = None
    if found.name is not None and found.name not in models.PRESETS:
        saved = run.load_config(found.name, found.early.get("modules", ()))
        if saved is None:
            hint = near(found.name, models.PRESETS)
            raise ConfigError(f"{found.name!r} is neither a preset nor a run folder; {hint}")
    config = saved or flags.start(found, text=False)
    prog = f"nestedjax levels {found.name or config.preset}"
    read = flags.read(prog, options, found, config, about=__doc__ or "", example=EXAMPLE)
    if read is None:
        return 0
    own, changes = read
    if saved is not None and changes:
        raise ConfigError(
            f"a run keeps its settings: leave out {', '.join(changes)}, or name a preset"
        )
    return _show(config if saved is not None else flags.changed(config, changes), own)


def _show(config: Any, own: dict[str, Any]) -> int:
    from nestedjax import levels, run
    from nestedjax.errors import ConfigError

    system, picture = run.nested_system(config), own.get("plot")
    if picture == "":
        raise UsageError("--plot '': is empty; name a .png file")
    if picture is not None:
        from nestedjax.cli.levels_plot import plot

        try:
            plot(system, picture, title=f"{config.preset}: its nested system")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot write {picture} ({error}); give a .png in a folder that can be written"
            ) from error
    if own.get("json"):
        print(json.dumps([box.row() for box in system.boxes], indent=2))
        return 0
    print(levels.table(system.boxes))
    if picture is not None:
        print(f"\npicture: {picture}")
    return 0
