"""Continue a prompt with a trained run: recurrent decoding with a state of constant size."""

import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from nestedjax.cli.command import parse
from nestedjax.cli.errors import guarded

EXAMPLE = """  nestedjax generate runs/first --prompt "ROMEO:" --tokens 300 --top-k 40
  nestedjax generate runs/first --prompt-file chapter1.txt --adapt --periods 64 256 none none
"""


def generate(
    run: str,
    /,
    *,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    prompt_file: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    adapt: bool = False,
    periods: tuple[int | None, ...] | None = None,
    inner_learning_rate: float | None = None,
    modules: Annotated[tuple[str, ...], Parameter("--import")] = (),
) -> int:
    """Print a prompt and its continuation.

    Args:
      run: the run folder.
      prompt: what to continue; none for a new line, or a full stop if the run's tokenizer reads no
        new lines.
      prompt_file: the file with what to continue, all of it; - for standard input.
      tokens: how many to draw.
      temperature: 0 (or less than 1e-30) takes the likeliest token each time.
      top_k: draw among so many likeliest tokens; none for all.
      seed: of the draws.
      adapt: let the continuum memory learn from the prompt, then go on with what it learned.
      periods: with --adapt, tokens between two writes of each block, fast first, none to freeze
        it; by default 64 256 1024 4096 for a run whose blocks learned from the training stream.
      inner_learning_rate: with --adapt, of the blocks; none for the model's.
      modules: modules to import, in which models of your own are.
    """
    from nestedjax import run as runs
    from nestedjax.cli import flags
    from nestedjax.cli.printing import printable
    from nestedjax.errors import ConfigError

    if not adapt and (periods is not None or inner_learning_rate is not None):
        raise ConfigError("--periods and --inner-learning-rate need --adapt; add it")
    if prompt_file is not None:
        if prompt is not None:
            raise ConfigError("--prompt and --prompt-file are two prompts; give one of them")
        prompt = _text_of(prompt_file)
    flags.import_modules(modules)
    trained = runs.load(run)
    if prompt is None:
        prompt = runs.default_prompt(trained.tokenizer)
    if adapt:
        trained, writes = runs.adapted(
            trained, prompt, periods=periods, learning_rate=inner_learning_rate
        )
        told = ", ".join(f"{n} of {period} tokens" for period, n in writes.items())
        print(f"learning from the prompt: writes of its blocks {told}", file=sys.stderr)
    text = runs.generate(
        trained,
        prompt,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        settle=adapt,
    )
    print(printable(prompt + text))
    return 0


def _text_of(file: str) -> str:
    """The text of a prompt's file, or of standard input.

    Raises:
      DataError: it cannot be read, is empty, or is no text.
    """
    from nestedjax.data import DataError, as_text, read_file

    if file == "-":
        name = "standard input"
        data = b"" if sys.stdin is None else as_text(sys.stdin.buffer.read(), name)
    else:
        name, data = file, read_file(file, once=True)
    if not data:
        raise DataError(f"{name} is empty; give a prompt of at least one character")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 at byte {error.start}; convert it to give it as a prompt"
        ) from error
    if "\0" in text:
        raise DataError(f"{name} holds NUL bytes, as no text does; give a file of text")
    return text


def main(argv: Sequence[str]) -> int:
    """`nestedjax generate`; returns the exit code."""
    call = parse("nestedjax generate RUN", generate, argv, about=__doc__ or "", example=EXAMPLE)
    return 0 if call is None else guarded("generate", call)
