"""Continue a prompt with a trained run: recurrent decoding with a state of constant size."""

import argparse
import sys

EXAMPLE = """example:
  nestedjax generate runs/first --prompt "ROMEO:" --tokens 300 --temperature 0.8 --top-k 40
  nestedjax generate runs/first --prompt "$(cat chapter1.txt)" --adapt"""

PERIODS = (64, 256, 1024, 4096)  # tokens of the prompt, for each block of a continuum memory


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


def run(args: argparse.Namespace) -> int:
    """Generate; returns the exit code."""
    import jax
    import numpy as np

    from nestedjax import models, runs
    from nestedjax.cli.printing import printable
    from nestedjax.overrides import ConfigError, at_least

    at_least("--tokens", args.tokens, 1)
    at_least("--top-k", args.top_k, 1)
    at_least("--seed", args.seed, 0)
    if not args.temperature >= 0:
        raise ConfigError(f"--temperature {args.temperature} must be 0 or more; try 0.8")
    if not args.adapt and (args.periods is not None or args.inner_rate is not None):
        raise ConfigError("--periods and --inner-rate need --adapt; add it, or leave them out")
    runs.require_config(args.run)
    loaded = runs.load(args.run)
    prompt = np.asarray(loaded.vocabulary.encode(args.prompt), np.int32)
    if not prompt.size:
        raise ConfigError("--prompt is empty; give at least one character, or leave it out")
    model = _learner(loaded.model, prompt.size, args) if args.adapt else loaded.model
    definition, params = models.split(model)
    draw = runs.sampler(
        definition,
        tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        settle=args.adapt,
    )
    new = draw(params, prompt, jax.random.key(args.seed))
    print(printable(args.prompt + loaded.vocabulary.decode(new)))
    return 0


def _learner(model, size: int, args: argparse.Namespace):
    """The model that learns from a prompt of so many tokens."""
    import dataclasses

    from nestedjax import models
    from nestedjax.overrides import ConfigError, one_line, parse

    cms = model.config.continuum
    inner = None if cms is None else cms.inner
    periods = None
    if args.periods is not None:
        periods = parse(tuple[int | None, ...], args.periods, "--periods")
    elif cms is not None and cms.lifetime == "stream":
        periods = tuple(PERIODS[: len(cms.periods)]) + (None,) * (len(cms.periods) - len(PERIODS))
    try:
        if args.inner_rate is not None and inner is not None:
            inner = dataclasses.replace(inner, learning_rate=args.inner_rate)
        learner = models.adapting(model, periods=periods, inner=inner)
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    timed = learner.config.continuum.timed  # type: ignore[union-attr]
    # A chunk is written once the token behind it is read; the last token of the prompt is not
    # learned from, because it is what generation begins with.
    writes = [max(size - 2, 0) // period for period in timed]
    if not writes[0]:
        raise ConfigError(
            f"the prompt has {size} tokens, too few to learn from in chunks of {timed[0]}; give at "
            f"least {timed[0] + 2}, or a smaller period with --periods"
        )
    told = ", ".join(f"{n} of {p} tokens" for n, p in zip(writes, timed, strict=True))
    print(f"learning from the prompt: writes of its blocks {told}", file=sys.stderr)
    return learner
