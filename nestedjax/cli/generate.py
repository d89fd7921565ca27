"""Continue a prompt with a trained run: recurrent decoding with a state of constant size."""

import argparse
import sys

EXAMPLE = """example:
  nestedjax generate runs/first --prompt "ROMEO:" --tokens 300 --temperature 0.8 --top-k 40
  nestedjax generate runs/first --prompt "$(cat chapter1.txt)" --adapt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--prompt", metavar="TEXT", default="\n", help="default: a new line")
    parser.add_argument("--tokens", metavar="N", type=int, default=256, help="default 256")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.8, help="0: the likeliest; default 0.8"
    )
    parser.add_argument("--top-k", metavar="K", type=int, help="draw among the K likeliest tokens")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="default 0")
    parser.add_argument(
        "--adapt",
        action="store_true",
        help="let the continuum memory learn from the prompt, then go on with what it learned",
    )
    parser.add_argument(
        "--periods",
        metavar="P,...",
        help="with --adapt: tokens between two writes of each block, fast first, none to freeze it;"
        " default 64,256,1024,4096 for a run whose blocks learned from the training stream",
    )
    parser.add_argument(
        "--inner-rate", metavar="R", type=float, help="with --adapt: learning rate of the blocks"
    )


def main(args: argparse.Namespace) -> int:
    """Generate; returns the exit code."""
    from nestedjax import run
    from nestedjax.cli.printing import printable
    from nestedjax.errors import ConfigError
    from nestedjax.overrides import parse

    if not args.adapt and (args.periods is not None or args.inner_rate is not None):
        raise ConfigError("--periods and --inner-rate need --adapt; add it, or leave them out")
    trained = run.load(args.run)
    if args.adapt:
        periods = args.periods
        if periods is not None:
            periods = parse(tuple[int | None, ...], periods, "--periods")
        trained, writes = run.adapted(
            trained, args.prompt, periods=periods, learning_rate=args.inner_rate
        )
        told = ", ".join(f"{n} of {period} tokens" for period, n in writes.items())
        print(f"learning from the prompt: writes of its blocks {told}", file=sys.stderr)
    text = run.generate(
        trained,
        args.prompt,
        tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        settle=args.adapt,
    )
    print(printable(args.prompt + text))
    return 0
