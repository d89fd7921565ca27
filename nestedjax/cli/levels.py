"""The nested system of a preset or run, slow to fast: every box that learns, from what, by what
rule and how often, and the optimizer's own memories among them."""

import argparse
import json

EXAMPLE = """example:
  nestedjax levels hope_nano
  nestedjax levels hope_nano --set cms.periods=2048,4096,none,none --plot levels.png
  nestedjax levels runs/first --json

period: tokens between two writes (frozen: never; 0: solved anew for every query); of what the outer
optimizer writes, tokens of the training stream. frequency: writes per token. state bytes: for one
sequence; of the optimizer's memories, in total."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("system", metavar="PRESET_OR_RUN", help="a preset, or a run folder")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        nargs="+",
        default=[],
        help="change a setting of the preset",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of boxes")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the system")


def main(args: argparse.Namespace) -> int:
    """Describe; returns the exit code."""
    from nestedjax import levels, run
    from nestedjax.errors import ConfigError

    config = _config(args)
    system = run.nested_system(config)
    boxes = system.boxes
    if args.plot:
        from nestedjax.cli.levels_plot import plot

        try:
            plot(system, args.plot, title=f"{config.preset}: its nested system")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot write {args.plot} ({error}); give a .png in a folder that can be written"
            ) from error
    if args.json:
        print(json.dumps([box.row() for box in boxes], indent=2))
    else:
        print(levels.table(boxes))
        if args.plot:
            print(f"\npicture: {args.plot}")
    return 0


def _config(args: argparse.Namespace):
    from nestedjax import models, run
    from nestedjax.cli.training import assigned
    from nestedjax.errors import ConfigError, near

    assignments = [item for group in args.set for item in group]
    if args.system in models.PRESETS:
        return run.check(assigned(run.run_preset(args.system), assignments))
    saved = run.load_config(args.system)
    if saved is None:
        raise ConfigError(
            f"{args.system!r} is neither a preset nor a run folder; "
            f"{near(args.system, models.PRESETS)}"
        )
    if assignments:
        raise ConfigError("a run keeps its settings; leave out --set, or name a preset")
    return saved
