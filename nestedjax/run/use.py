"""What a trained model uses: its loss with each part switched off, gates and starts of memories."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nestedjax import models
from nestedjax.errors import ConfigError, one_line, shown
from nestedjax.evaluation import Blocks, GateReach, Moved, Use, block_losses, use
from nestedjax.models.switch import Table, table
from nestedjax.run.assemble import build
from nestedjax.run.config import RunConfig
from nestedjax.run.functions import token_losses

PyTree = Any
Scorer = tuple[Callable[..., Any], Callable[..., Any]]


def scorer(definition: models.Definition) -> Scorer:
    """Compiled functions of weights: the start of a context, and the losses of a piece of text."""

    @jax.jit
    def start(weights):
        return models.merge(definition, weights).init_state(1)

    @jax.jit
    def score(weights, tokens, targets, state):
        logits, state = models.merge(definition, weights)(tokens, state)
        return token_losses(logits, targets), state

    return start, score


def asked(use: Any, model: models.Model) -> list[tuple[str, str]]:
    """The switches that `evaluate` is asked for.

    Args:
      use: whether, or a list of `(name, switch)`.
      model: the model.

    Raises:
      ConfigError: it is neither, the model has no such name or switch, or cannot be switched.
    """
    if isinstance(use, bool) and not use:
        return []
    try:
        known = models.switches(model)
        if isinstance(use, bool):
            return known
        pairs = [tuple(pair) for pair in use]
        if any(len(pair) != 2 for pair in pairs) or isinstance(use, str):
            raise TypeError
    except TypeError as error:
        raise ConfigError(
            f"use={shown(use)} must be True, or a list of (name, switch), such as"
            ' [("memories", "not_written")]'
        ) from error
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    for name, switch in pairs:
        if (name, switch) not in known:
            there = ", ".join(f"{n}:{s}" for n, s in known) or "none"
            raise ConfigError(f"use: the model has no {name}:{switch}; it has {there}")
    return pairs  # type: ignore[return-value]


def uses(
    run: RunConfig,
    model: models.Model,
    pairs: Sequence[tuple[str, str]],
    texts: Sequence[np.ndarray],
    *,
    piece: int,
) -> list[Use]:
    """The loss of texts with each switch on its own, against that of the model as it is.

    Switches that do the same to the model, such as "memories" where there is one, are measured
    once. A kernel has no switches: its memories run in XLA here, which computes the same.

    Args:
      run: of the model.
      model: with its weights.
      pairs: `(name, switch)` of each row.
      texts: tokens of each text, at least two.
      piece: tokens of a block.
    """
    model = in_xla(run, model)
    known: Table = table(model)
    definition, weights = models.split(model)
    start, score = scorer(definition)
    state = start(weights)

    def blocks(score: Callable[..., Any]) -> Blocks:
        def of(tokens, targets, state):
            return score(weights, tokens, targets, state)

        return block_losses(of, state, texts, piece=piece)

    plain, measured, rows = blocks(score), dict[frozenset, Blocks](), []
    for name, switch in pairs:
        what = frozenset(known[name, switch])
        if what not in measured:
            changed = models.split(models.switched(model, {name: switch}))[0]
            measured[what] = blocks(scorer(changed)[1])
        rows.append(use(name, switch, plain, measured[what]))
    return rows


def in_xla(run: RunConfig, model: models.Model) -> models.Model:
    """The same model with memories that run in XLA, whatever its configuration says."""
    if run.model.implementation == "xla":
        return model
    plain = dataclasses.replace(run.model, implementation="xla")
    built = build(dataclasses.replace(run, model=plain))
    return models.merge(built.definition, models.split(model)[1])


def gates(
    run: RunConfig, model: models.Model, texts: Sequence[np.ndarray], *, piece: int
) -> list[GateReach]:
    """How far the gates of the memories go on texts, each read as one context.

    Args:
      run: of the model.
      model: with its weights.
      texts: tokens of each text, at least two.
      piece: tokens that are read at once; what is left of a longer text is not looked at.
    """
    watched = models.watched(in_xla(run, model))
    definition, weights = models.split(watched)
    start = jax.jit(lambda weights: models.merge(definition, weights).init_state(1))

    @jax.jit
    def read(weights, tokens, state):
        return models.merge(definition, weights)(tokens, state)[1]

    reached: dict[tuple[str, str], list[tuple[float, float, float, int]]] = {}
    for tokens in texts:
        state, size = start(weights), min(piece, tokens.size)
        count = tokens.size // size * size
        for first in range(0, count, size):
            state = read(weights, tokens[None, first : first + size].astype(np.int32), state)
        for key, (least, mean, most) in models.gate_ranges(watched, state).items():
            reached.setdefault(key, []).append((least, mean, most, count))
    rows = []
    for (name, gate), found in reached.items():
        least, mean, most, count = (np.array(column) for column in zip(*found, strict=True))
        average = float(np.average(mean, weights=count))
        rows.append(GateReach(name, gate, float(least.min()), average, float(most.max())))
    return rows


def moved(run: RunConfig, model: models.Model) -> list[Moved]:
    """How far training has moved what each memory begins from, drawn again from the run's seed.

    Args:
      run: of the model.
      model: with its weights.
    """
    now = models.memory_starts(model)
    if not now:
        return []
    built = build(run)
    drawn = models.memory_starts(models.merge(built.definition, built.draw()))
    rows = []
    for name, weights in now.items():
        pairs = [(np.float64(a), np.float64(b)) for a, b in zip(weights, drawn[name], strict=True)]
        size = np.sqrt(sum(np.sum(b**2) for _, b in pairs))
        step = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs))
        rows.append(Moved(name, float(step / size) if size else float("nan")))
    return rows
