"""From a prompt to tokens, and from the tokens drawn after it to text."""

import numpy as np

from nestedjax.data import Tokenizer
from nestedjax.errors import ConfigError

STARTS = ("\n", ".", " ", "a")  # prompts to begin a text with: the first that has any token


def default_prompt(tokenizer: Tokenizer) -> str:
    """What a text begins after: a new line, or a full stop where a tokenizer drops new lines.

    Raises:
      ConfigError: the tokenizer reads neither, nor a letter.
    """
    for start in STARTS:
        if tokenizer.encode(start).size:
            return start
    raise ConfigError(
        "the tokenizer has no tokens for a new line, a stop or a letter; give another"
    )


def continuation(tokenizer: Tokenizer, prompt: np.ndarray, drawn: np.ndarray) -> str:
    """The text of the tokens drawn after a prompt.

    Both are decoded together: alone, the first word drawn would lose the space before it.

    Args:
      tokenizer: of both.
      prompt: its tokens, int[T].
      drawn: int[N].
    """
    before, whole = tokenizer.decode(prompt), tokenizer.decode(np.concatenate([prompt, drawn]))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(drawn)


def prompt_tokens(tokenizer: Tokenizer, vocab: int, prompt: str) -> np.ndarray:
    """The tokens of a prompt, int32[T].

    Raises:
      ConfigError: it is empty, or its tokens are not all of the model's.
    """
    if not isinstance(prompt, str):
        raise ConfigError(f"the prompt is {prompt!r}, a {type(prompt).__name__}; give text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt is not UTF-8 at character {error.start}; convert it"
        ) from error
    tokens = within(tokenizer.encode(prompt), vocab, "the prompt")
    if not tokens.size:
        empty = "is empty" if not prompt else f"{prompt[:20]!r} has no token in this tokenizer"
        raise ConfigError(f"the prompt {empty}; give at least one character, or leave it out")
    return tokens


def within(tokens: np.ndarray, vocab: int, name: str) -> np.ndarray:
    """The tokens, if the model has all of them."""
    tokens = np.asarray(tokens, np.int32)
    if tokens.size and tokens.max() >= vocab:
        raise ConfigError(
            f"{name} has token {tokens.max()}, and the model's end at {vocab - 1}: it was trained"
            " on tokens of another kind"
        )
    return tokens
