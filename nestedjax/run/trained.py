"""A trained model: loaded from a run folder, continued from a prompt, measured on texts."""

import dataclasses
import functools
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from nestedjax import models
from nestedjax.checkpoint import CheckpointError, Checkpoints, Restored
from nestedjax.data import (
    DataError,
    Document,
    Tokenizer,
    bundled,
    digest,
    encode,
    read_documents,
    reading,
    take_split,
)
from nestedjax.errors import ConfigError, at_least, one_line
from nestedjax.evaluation import GateReach, Losses, Moved, Totals, Use, rows_of, stream_losses
from nestedjax.run.assemble import build, on_one_device
from nestedjax.run.config import RunConfig
from nestedjax.run.data import tokenizer_of
from nestedjax.run.folder import require_config
from nestedjax.run.functions import sampler, token_losses
from nestedjax.run.prompt import continuation, default_prompt, prompt_tokens, within
from nestedjax.run.use import asked, gates, moved, uses

PIECE = 512  # tokens of a text that are scored at once
PERIODS = (64, 256, 1024, 4096)  # tokens of a prompt, for each block of a continuum memory


class Trained(NamedTuple):
    """A trained model.

    Attributes:
      model: with its weights: `logits, state = trained.model(tokens, state)`.
      tokenizer: its tokens: `encode` and `decode`.
      run: its configuration.
      step: updates that it has seen.
      trained_on: the fingerprint of its data, if it was loaded.
    """

    model: models.Model
    tokenizer: Tokenizer
    run: RunConfig
    step: int
    trained_on: Mapping[str, Any] | None = None


class Evaluation(NamedTuple):
    """The losses of a model on texts.

    Attributes:
      files: name of each text -> its losses.
      all: over all of them.
      use: the loss with parts of the model switched off, if it was asked for, over rows of the
        run's length, each a fresh context.
      unswitched: the loss of the model as it is over the same rows, with `use`; else NaN.
      gates: how far the gates of the memories went, with `use`.
      starts: how far training has moved what memories begin from, with `use`.
    """

    files: dict[str, Losses]
    all: Losses
    use: Sequence[Use] = ()
    unswitched: float = math.nan
    gates: Sequence[GateReach] = ()
    starts: Sequence[Moved] = ()

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
    path = _run_folder(folder)
    config = require_config(folder, modules)
    built, tokenizer = build(config), tokenizer_of(config)
    restored = _newest(path / "checkpoints", on_one_device(built.shapes))
    if restored is None:
        raise CheckpointError(f"no checkpoint in {os.fspath(folder)} yet; train it first")
    trained_on = restored.meta.get("data", {})
    if trained_on.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise ConfigError(
            f"{config.data.tokenizer or 'bytes'} is not the tokenizer that this run was trained"
            f" with ({trained_on['tokenizer']}, now {tokenizer.fingerprint}); put the old file back"
        )
    model = models.merge(built.definition, restored.state)
    return Trained(model, tokenizer, config, restored.step, trained_on)


def _run_folder(folder: Any) -> epath.Path:
    """The path of a run folder to read from.

    Raises:
      ConfigError, DataError: it is no path, a file, or nothing that can be read from here.
    """
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ConfigError(f"folder is {folder!r}; give the path of a run folder")
    with reading(folder) as path:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{os.fspath(folder)} is a file, not a run folder; name the folder")
    return path


def _newest(folder: epath.Path, shapes: Any) -> Restored | None:
    """The newest whole checkpoint; looks again where training removed old ones meanwhile."""
    while folder.exists():
        with Checkpoints(folder, read_only=True) as found:
            try:
                return found.restore(shapes, part="params")
            except CheckpointError:
                with Checkpoints(folder, read_only=True) as now:
                    if now.steps() == found.steps():
                        raise
    return None


def generate(
    trained: Trained,
    prompt: str | None = None,
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
      prompt: at least one character; None for `default_prompt`.
      tokens: how many to draw.
      temperature: 0, or less than 1e-30, takes the likeliest token each time.
      top_k: draw among the k likeliest tokens only.
      seed: of the draws; less than 2^32.
      settle: for a model that learns in context: learn from the prompt, not from what is drawn.

    Raises:
      ConfigError: a value of another type or out of its range, or a prompt that the model cannot
        read.
    """
    _require_trained(trained)
    _whole_number("tokens", tokens, 1)
    if top_k is not None:
        _whole_number("top_k", top_k, 1)
    _whole_number("seed", seed, 0)
    if seed >= 2**32:  # of which jax would take the lowest 32 bits
        raise ConfigError(f"seed={seed} must be less than 2^32; give a smaller one")
    number = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    if not number or not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature={temperature!r} must be 0 or more, and finite; try 0.8")
    if settle and not isinstance(trained.model, models.InContextModel):
        raise ConfigError("settle=True is for a model that learns in context; see run.adapted")
    if prompt is None:
        prompt = default_prompt(trained.tokenizer)
    read = prompt_tokens(trained.tokenizer, trained.run.model.vocab, prompt)
    definition, weights = models.split(trained.model)
    draw = cached_sampler(definition, int(tokens), float(temperature), top_k, settle)
    drawn = draw(weights, read, jax.random.key(int(seed)))
    text = continuation(trained.tokenizer, read, drawn)
    # A tokenizer may drop the space that ends a prompt; what follows then begins with it.
    kept = trained.tokenizer.decode(read)[-1:].isspace() or not prompt[-1:].isspace()
    return text if kept else text.removeprefix(" ")


def evaluate(
    trained: Trained,
    files: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    *,
    use: bool | Sequence[tuple[str, str]] = False,
) -> Evaluation:
    """The loss of a model on texts, each document one context from its first token to its last.

    So it differs from the `val_loss` of training, whose rows each begin a fresh context.

    Args:
      trained: from `load`, or `train(...).trained`.
      files: text files or folders; None for the held-out parts of the run's own text: its
        validation split (5%) and its test split (5%).
      use: also measure what the model relies on: for each name and switch of `models.switches`,
        or for those given as `[("memories", "not_written"), ...]`, the loss of the same texts with
        that part of the model switched off, in rows of the run's length, each a fresh context, as
        validation reads them. Every switch reads the texts once more.

    Returns:
      The losses; with `use` also `.use`, a row for each switch with `name`, `switch`, `loss`,
      `delta` and `standard_error` (in nats per token; over blocks of 512 tokens), and what the
      gates and starts of the memories are on these texts.

    Raises:
      DataError: a file is missing, empty or a single token; or the run has no text of its own, or
        its text is not what it was.
      ConfigError: a switch that the model does not have, or a model that cannot be switched.
    """
    _require_trained(trained)
    pairs = asked(use, trained.model)
    definition, weights = models.split(trained.model)
    start, score = _scorer(definition)
    state, found, read = start(weights), {}, []
    for name, documents in _texts(trained, files).items():
        losses = Losses(Totals(), {})
        for document in documents:
            tokens = encode(trained.tokenizer, document)
            tokens = within(tokens, trained.run.model.vocab, document.name)
            if tokens.size >= 2:
                read.append(tokens)
                losses = losses.plus(
                    stream_losses(
                        functools.partial(score, weights),
                        state,
                        tokens,
                        size_bytes=len(document.text),
                        piece=PIECE,
                    )
                )
        if not losses.total.tokens:
            raise DataError(
                f"{name} has less than two tokens, which predicts nothing; give more text"
            )
        found[name] = losses
    result = Evaluation(found, functools.reduce(Losses.plus, found.values()))
    if isinstance(use, bool) and not use:
        return result
    run, model, rows = trained.run, trained.model, rows_of(read, trained.run.data.length)
    plain, costs = uses(run, model, pairs, rows)
    return result._replace(
        use=costs, unswitched=plain, gates=gates(run, model, rows), starts=moved(run, model)
    )


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
    size = prompt_tokens(trained.tokenizer, trained.run.model.vocab, prompt).size
    timed = learning.timed
    # A chunk is written once the token behind it is read; the last token of the prompt is not
    # learned from, because it is what generation begins with.
    writes = {period: max(size - 2, 0) // period for period in timed}
    if not writes[timed[0]]:
        raise ConfigError(
            f"the prompt has {size} tokens, too few to learn from in chunks of {timed[0]}; give at "
            f"least {timed[0] + 2}, or a smaller period"
        )
    return trained._replace(model=learner), writes


def _require_trained(trained: Any) -> None:
    if not isinstance(trained, Trained):
        raise ConfigError(f"trained is {trained!r}; load a run with nestedjax.load")


def _whole_number(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number, or below a bound."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{name}={value!r} must be a whole number")
    at_least(name, int(value), least)


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


def _texts(trained: Trained, files: Any) -> dict[str, list[Document]]:
    """What to evaluate: name -> documents."""
    found: dict[str, list[Document]] = {}
    if files is not None:
        for document in read_documents(files):
            found.setdefault(document.file, []).append(document)
        return found
    config, known = trained.run, trained.trained_on or {}
    if "data" in config.given:
        raise DataError("this run was trained on data given in Python; name text files")
    own = read_documents(config.data.files or bundled())
    if known.get("text") not in (None, digest(take_split(own, "train"))):
        raise DataError(
            "the run's text is not what it was trained on, so that what is held out now may have"
            " been trained on; put the text back, or name text files"
        )
    return {f"{split} split": take_split(own, split) for split in ("valid", "test")}
