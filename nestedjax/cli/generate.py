"""Continue a prompt with a trained run: recurrent decoding with a state of constant size."""

import argparse

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
        help="let the continuum memory learn from the prompt before it goes on",
    )


def run(args: argparse.Namespace) -> int:
    """Generate; returns the exit code."""
    import jax
    import numpy as np
    from flax import nnx

    from nestedjax import runs
    from nestedjax.cli.printing import printable
    from nestedjax.overrides import ConfigError, at_least

    at_least("--tokens", args.tokens, 1)
    at_least("--top-k", args.top_k, 1)
    at_least("--seed", args.seed, 0)
    if not args.temperature >= 0:
        raise ConfigError(f"--temperature {args.temperature} must be 0 or more; try 0.8")
    runs.require_config(args.run)
    loaded = runs.load(args.run)
    prompt = np.asarray(loaded.vocabulary.encode(args.prompt), np.int32)
    if not prompt.size:
        raise ConfigError("--prompt is empty; give at least one character, or leave it out")
    if args.adapt:
        raise ConfigError("--adapt is not available yet; leave it out")
    graphdef, params = nnx.split(loaded.model)
    draw = runs.sampler(
        graphdef, tokens=args.tokens, temperature=args.temperature, top_k=args.top_k
    )
    new = draw(params, prompt, jax.random.key(args.seed))
    print(printable(args.prompt + loaded.vocabulary.decode(new)))
    return 0
