"""A trained model: loaded from a run folder, continued from a prompt, measured on texts."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from nestedjax import models
from nestedjax.checkpoint import CheckpointError, Checkpoints
from nestedjax.data import DataError, Tokenizer, bundled, expand, read_documents, take_split
from nestedjax.errors import ConfigError, at_least, one_line
from nestedjax.evaluation import Losses, Totals, stream_losses
from nestedjax.run.assemble import build, on_one_device
from nestedjax.run.config import RunConfig
from nestedjax.run.data import tokenizer_of
from nestedjax.run.folder import require_config
from nestedjax.run.functions import sampler, token_losses

PIECE = 512  # tokens of a text that are scored at once
PERIODS = (64, 256, 1024, 4096)  # tokens of a prompt, for each block of a continuum memory


class Trained(NamedTuple):
    """A trained model.

    Attributes:
      model: with its weights: `logits, state = trained.model(tokens, state)`.
      tokenizer: its tokens: `encode` and `decode`.
      run: its configuration.
      step: updates that it has seen.
    """

    model: models.Model
    tokenizer: Tokenizer
    run: RunConfig
    step: int


class Evaluation(NamedTuple):
    """The losses of a model on texts.

    Attributes:
      files: name of each text -> its losses.
      all: over all of them.
    """

    files: dict[str, Losses]
    all: Losses

    @property
    def loss(self) -> float:
        """Nats per token, over all texts."""
        return self.all.total.loss

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits for each byte of text, whatever the tokenizer."""
        return self.all.total.bits_per_byte


def load(folder: str | os.PathLike, modules: Sequence[str] = ()) -> Trained:
    """The newest whole model of a run folder, on one device; only its weights are read.

    Args:
      folder: of the run.
      modules: names of the modules to import, if its model is of a class of the user's own.

    Raises:
      ConfigError: it is no run folder, or needs a module that was not named.
      CheckpointError: nothing is saved in it yet, or nothing in it is whole.
    """
    config = require_config(folder, modules)
    built, checkpoints = build(config), epath.Path(folder) / "checkpoints"
    restored = None
    if checkpoints.exists():
        with Checkpoints(checkpoints, read_only=True) as found:
            restored = found.restore(on_one_device(built.shapes), part="params")
    if restored is None:
        raise CheckpointError(f"no checkpoint in {os.fspath(folder)} yet; train it first")
    model = models.merge(built.definition, restored.state)
    return Trained(model, tokenizer_of(config), config, restored.step)


def generate(
    trained: Trained,
    prompt: str = "\n",
    *,
    tokens: int = 256,
    temperature: float | int = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    settle: bool = False,
) -> str:
    """The text that a model continues a prompt with, without the prompt.

    Args:
      trained: from `load`, or `train(...).trained`.
      prompt: at least one character.
      tokens: how many to draw.
      temperature: 0 takes the likeliest token each time.
      top_k: draw among the k likeliest tokens only.
      seed: of the draws.
      settle: for a model that learns in context: learn from the prompt, not from what is drawn.

    Raises:
      ConfigError: a value out of its range, or a prompt that the model cannot read.
    """
    for name, value, least in (("tokens", tokens, 1), ("top_k", top_k, 1), ("seed", seed, 0)):
        at_least(name, value, least)
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature} must be 0 or more; try 0.8")
    if settle and not isinstance(trained.model, models.InContextModel):
        raise ConfigError("settle=True is for a model that learns in context; see run.adapted")
    read = prompt_tokens(trained, prompt)
    definition, weights = models.split(trained.model)
    draw = cached_sampler(definition, tokens, temperature, top_k, settle)
    return trained.tokenizer.decode(draw(weights, read, jax.random.key(seed)))


def evaluate(
    trained: Trained, files: str | os.PathLike | Sequence[str | os.PathLike] | None = None
) -> Evaluation:
    """The loss of a model on texts, each document one context from its first token to its last.

    Args:
      trained: from `load`, or `train(...).trained`.
      files: text files or folders; None for the held-out parts of the run's own text: its
        validation split (5%) and its test split (5%).

    Raises:
      DataError: a file is missing, empty or a single token; or the run has no text of its own.
    """
    definition, weights = models.split(trained.model)
    start, score = _scorer(definition)
    state, found = start(weights), {}
    for name, documents in _texts(trained.run, files):
        losses = Losses(Totals(), {})
        for text in documents:
            tokens = _encoded(trained, text, name)
            if tokens.size >= 2:
                losses = losses.plus(
                    stream_losses(
                        functools.partial(score, weights),
                        state,
                        tokens,
                        size_bytes=len(text),
                        piece=PIECE,
                    )
                )
        if not losses.total.tokens:
            raise DataError(f"{name} has a single token, which predicts nothing; give more text")
        found[name] = losses
    return Evaluation(found, functools.reduce(Losses.plus, found.values()))


def adapted(
    trained: Trained,
    prompt: str,
    *,
    periods: Sequence[int | None] | None = None,
    learning_rate: float | int | None = None,
) -> tuple[Trained, dict[int, int]]:
    """The model whose continuum memory learns from the prompt that `generate` is given.

    Args:
      trained: with a continuum memory.
      prompt: long enough for a write.
      periods: tokens between two writes of each block, fast first, None to freeze it; default the
        model's own in lifetime "in_context", else 64, 256, 1024, 4096.
      learning_rate: of the blocks; default the model's.

    Returns:
      The model that learns, and how often each period of its blocks ends in the prompt.

    Raises:
      ConfigError: there is no such memory, or the prompt is shorter than its fastest period.
    """
    cms = trained.model.config.continuum
    inner = None if cms is None else cms.inner
    if periods is None and cms is not None and cms.lifetime == "stream":
        frozen = (None,) * (len(cms.periods) - len(PERIODS))
        periods = PERIODS[: len(cms.periods)] + frozen
    try:
        if learning_rate is not None and inner is not None:
            inner = dataclasses.replace(inner, learning_rate=learning_rate)
        given = None if periods is None else tuple(periods)
        learner = models.adapting(trained.model, periods=given, inner=inner)
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    learning = learner.config.continuum
    assert learning is not None
    size, timed = prompt_tokens(trained, prompt).size, learning.timed
    # A chunk is written once the token behind it is read; the last token of the prompt is not
    # learned from, because it is what generation begins with.
    writes = {period: max(size - 2, 0) // period for period in timed}
    if not writes[timed[0]]:
        raise ConfigError(
            f"the prompt has {size} tokens, too few to learn from in chunks of {timed[0]}; give at "
            f"least {timed[0] + 2}, or a smaller period"
        )
    return trained._replace(model=learner), writes


def prompt_tokens(trained: Trained, prompt: str) -> np.ndarray:
    """The tokens of a prompt, int32[T].

    Raises:
      ConfigError: it is empty, or its tokens are not all of the model's.
    """
    tokens = _encoded(trained, prompt, "the prompt")
    if not tokens.size:
        raise ConfigError("the prompt is empty; give at least one character, or leave it out")
    return tokens


def _encoded(trained: Trained, text: str | bytes, name: str) -> np.ndarray:
    tokens, vocab = np.asarray(trained.tokenizer.encode(text), np.int32), trained.run.model.vocab
    if tokens.size and tokens.max() >= vocab:
        raise ConfigError(
            f"{name} has token {tokens.max()}, and the model's end at {vocab - 1}: it was trained"
            " on tokens of another kind"
        )
    return tokens


@functools.lru_cache(maxsize=8)
def cached_sampler(
    definition: models.Definition,
    tokens: int,
    temperature: float | int = 0.8,
    top_k: int | None = None,
    settle: bool = False,
) -> Callable[..., np.ndarray]:
    """`functions.sampler`, compiled once for the same arguments."""
    return sampler(definition, tokens=tokens, temperature=temperature, top_k=top_k, settle=settle)


@functools.lru_cache(maxsize=8)
def _scorer(definition: models.Definition) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compiled functions: the state at the start of a context, and the losses of a piece."""

    @jax.jit
    def start(weights):
        return models.merge(definition, weights).init_state(1)

    @jax.jit
    def score(weights, tokens, targets, state):
        logits, state = models.merge(definition, weights)(tokens, state)
        return token_losses(logits, targets), state

    return start, score


def _texts(config: RunConfig, files) -> list[tuple[str, list[bytes]]]:
    """What to evaluate: name -> documents."""
    if files:
        return [(str(path), read_documents(path)) for path in expand(files)]
    if "data" in config.given:
        raise DataError("this run was trained on data given in Python; name text files")
    own = read_documents(config.data.files or bundled())
    return [(f"{split} split", take_split(own, split)) for split in ("valid", "test")]
