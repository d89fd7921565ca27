"""Recall: values that were said once, asked for by their keys (MQAR; spec G10).

Claim under test: a memory that is written token by token learns to match keys, and HOPE's does so
in no more steps than DeltaNet's; a model in which nothing is written cannot.

Command:   python -m experiments.recall --scale cpu   (a part: --tasks 64x8 --models hope)
Data:      generated: KEY VALUE for each pair, then keys alone; the answer of each is its value.
           Keys and values are disjoint, four times as many of each as there are pairs
Protocol:  from scratch, AdamW at 3e-3 (b2 0.98, weight decay 0.01, clip 1), warm-up of 50 steps,
           then constant; batch 64; three seeds; accuracy on the same fresh batches by step, until
           it is 0.99; embeddings of standard deviation 1 (`small_models`). To name one of the
           values of the row is right once in as many as there are pairs or more
Hardware:  2 CPU cores; --scale gpu and tpu are meant for one chip
Output:    a table, `recall.json`, `recall.png` and the finished cells in --out (started again, it
           goes on); what was found is in LOG.md
"""

import functools

import numpy as np

from experiments import reports, trials
from experiments import small_models as small
from nestedjax import models

BATCH = 64


def configs(vocab: int) -> dict[str, models.ModelConfig]:
    """What is compared, by name.

    Args:
      vocab: tokens of the task.
    """
    return {
        "hope": small.hope(vocab),
        "hope_linear": small.hope(vocab, small.LINEAR),
        "deltanet": small.deltanet(vocab),
        "gated_deltanet": small.gated_deltanet(vocab),
        "transformer": small.transformer(vocab),
        "no_writes": small.hope(vocab, writes=False),
    }


def draw(
    rng: np.random.Generator, *, length: int, pairs: int, symbols: int, batch: int = BATCH
) -> trials.Batch:
    """Rows of `pairs` keys and values, then queries; every query counts the same.

    Args:
      rng: where they are drawn.
      length: tokens of a row.
      pairs: of a row; their keys differ, their values may not.
      symbols: keys (0 ... symbols - 1), and as many values (from `symbols` on).
      batch: rows.
    """
    keys = rng.permuted(np.tile(np.arange(symbols), (batch, 1)), axis=1)[:, :pairs]
    values = rng.integers(symbols, 2 * symbols, (batch, pairs))
    which = rng.integers(0, pairs, (batch, length - 2 * pairs))
    told = np.stack([keys, values], -1).reshape(batch, 2 * pairs)
    tokens = np.concatenate([told, np.take_along_axis(keys, which, 1)], 1).astype(np.int32)
    targets = np.zeros_like(tokens)
    targets[:, 2 * pairs :] = np.take_along_axis(values, which, 1)
    asked = np.zeros(tokens.shape, bool)
    asked[:, 2 * pairs :] = True
    weights = (asked / asked.sum()).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "asked": asked, "weights": weights}


def make(length: int, pairs: int) -> trials.Task:
    """The task of one length and number of pairs."""
    symbols = 4 * pairs
    rows = functools.partial(draw, length=length, pairs=pairs, symbols=symbols)
    about = f"recall, length {length}, {pairs} pairs, {symbols} keys and values, batch {BATCH}"
    valid = trials.heldout(rows, 4)
    return trials.Task(about, 2 * symbols, (BATCH, length), rows, trials.answers, {"fresh": valid})


def tasks(*sizes: tuple[int, int]):
    """Name -> what makes the task."""
    return {f"{length}x{n}": functools.partial(make, length, n) for length, n in sizes}


SMALL = ((32, 4), (64, 8), (128, 16))
LARGE = (*SMALL, (256, 32), (512, 64))
TASKS = {"smoke": tasks((32, 4)), "cpu": tasks(*SMALL), "gpu": tasks(*LARGE), "tpu": tasks(*LARGE)}
STEPS = {"32x4": 600, "64x8": 600, "128x16": 400}  # of two cores; on a chip all have 4,000
PLANS = {
    "smoke": lambda task: trials.Plan(6, 3, seeds=(0,)),
    "cpu": lambda task: trials.Plan(STEPS[task], 25, until=0.99),
    "gpu": lambda task: trials.Plan(4000, 50, until=0.99),
    "tpu": lambda task: trials.Plan(4000, 50, until=0.99),
}


def main() -> None:
    reports.run(
        "recall",
        __doc__,
        tasks=TASKS,
        plans=PLANS,
        configs=lambda task: configs(task.vocab),
        names=tuple(configs(2)),
        least=0.98,
        title="Recall: answers right, by training step (length x pairs)",
    )


if __name__ == "__main__":
    main()
