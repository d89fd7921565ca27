"""What a trained model relies on: its loss with each part switched off; its gates and starts.

Texts are cut into rows of the run's length, each a fresh context, as validation reads them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nestedjax import models
from nestedjax.errors import ConfigError, one_line, shown
from nestedjax.evaluation import Blocks, GateReach, Moved, Rows, Use, block_losses, use
from nestedjax.models.switch import table
from nestedjax.run.assemble import build
from nestedjax.run.config import RunConfig
from nestedjax.run.functions import token_losses

BATCH = 8  # rows that are read at once


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
    run: RunConfig, model: models.Model, pairs: Sequence[tuple[str, str]], rows: Rows
) -> tuple[float, list[Use]]:
    """The loss of rows with each switch on its own, against that of the model as it is.

    Switches that do the same to the model, such as "memories" where there is one, are measured
    once. A kernel has no switches: its memories run in XLA here, which computes the same.

    Args:
      run: of the model.
      model: with its weights.
      pairs: `(name, switch)` of each row.
      rows: of the texts, each a fresh context.

    Returns:
      The loss of the model as it is, and what each switch costs.
    """
    model = in_xla(run, model)
    known, weights = table(model), models.split(model)[1]

    def blocks(model: models.Model) -> Blocks:
        score = _scorer(models.split(model)[0])
        return block_losses(lambda *row: score(weights, *row), rows, batch=BATCH)

    plain, measured, found = blocks(model), dict[frozenset, Blocks](), []
    for name, switch in pairs:
        what = frozenset(known[name, switch])
        if what not in measured:
            measured[what] = blocks(models.switched(model, {name: switch}))
        found.append(use(name, switch, plain, measured[what]))
    return plain.loss, found


def _scorer(definition: models.Definition) -> Callable[..., jax.Array]:
    """The losses of rows, compiled."""

    @jax.jit
    def score(weights, tokens, targets):
        return token_losses(models.merge(definition, weights)(tokens)[0], targets)

    return score


def in_xla(run: RunConfig, model: models.Model) -> models.Model:
    """The same model with memories that run in XLA, whatever its configuration says."""
    if run.model.implementation == "xla":
        return model
    plain = dataclasses.replace(run.model, implementation="xla")
    built = build(dataclasses.replace(run, model=plain))
    return models.merge(built.definition, models.split(model)[1])


def gates(run: RunConfig, model: models.Model, rows: Rows) -> list[GateReach]:
    """How far the gates of the memories go on rows of text.

    Args:
      run: of the model.
      model: with its weights.
      rows: of the texts, each a fresh context; those that a text's end leaves short are left out
        where there are others.
    """
    watched = models.watched(in_xla(run, model))
    definition, weights = models.split(watched)

    @jax.jit
    def read(weights, tokens):
        model = models.merge(definition, weights)
        return model(tokens, model.init_state(tokens.shape[0]))[1]

    length = int(rows.tokens_of.max())
    tokens = rows.tokens[rows.tokens_of == length, :length]
    reached: dict[tuple[str, str], list[tuple[float, float, float, int]]] = {}
    for first in range(0, len(tokens), BATCH):
        batch = tokens[first : first + BATCH]
        found = models.gate_ranges(watched, read(weights, batch))
        for key, reach in found.items():
            reached.setdefault(key, []).append((*reach, len(batch)))
    made = []
    for (name, gate), parts in reached.items():
        least, mean, most, count = (np.array(column) for column in zip(*parts, strict=True))
        average = float(np.average(mean, weights=count))
        made.append(GateReach(name, gate, float(least.min()), average, float(most.max())))
    return made


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
