"""bAbI as language modelling: does a model answer about a story that it has just read?

Claim under test: HOPE *trained* with writes answers at least 20 points more of the questions than
the same HOPE trained without, on tasks 1, 4 and 5; DeltaNet, Gated DeltaNet and Transformer++ of
the same size are tuned on the same grid. Task 2 as it comes.

Command:   python -m experiments.babi --scale cpu   (a part: --tasks qa1 --models hope deltanet)
Data:      ../shared/data/babi/en-10k, tasks 1, 2, 4, 5, each story once (task 4 repeats half of
           its own); 90% of the stories are trained on; of the others half choose the learning rate
           and are the curve, the other half are the answers reported, and no run sees them before
           its end
Protocol:  words are tokens, one story a row, cut at `LENGTHS`; loss: mean over all words plus mean
           over the answers; AdamW (b2 0.98, weight decay 0.1, clip 1), warm-up of 40 steps, then a
           cosine; batch 32; embeddings of standard deviation 1 (`small_models`); each model at the
           best of one grid of rates on seed 0, then three seeds
Hardware:  2 CPU cores; --scale gpu and tpu are meant for one chip
Output:    a table with the step at which each passes 0.9, `babi.json`, `babi.png` and the finished
           cells in --out (started again, it goes on); what was found is in LOG.md
"""

import functools
import gzip
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import reports, trials
from experiments import small_models as small
from nestedjax import models
from nestedjax.data import DataError

DATA = Path(__file__).parents[2] / "shared" / "data" / "babi" / "en-10k"
BATCH = 32
NAMES = ("qa1", "qa2", "qa4", "qa5")


def configs(vocab: int) -> dict[str, models.ModelConfig]:
    """What is compared, by name.

    Args:
      vocab: tokens of the task.
    """
    return {
        "hope": small.hope(vocab),
        "hope_static": small.hope(vocab, static=small.PROJECTIONS),
        "hope_no_writes": small.hope(vocab, writes=False),
        "hope_linear": small.hope(vocab, small.LINEAR),
        "hope_linear_static": small.hope(vocab, small.LINEAR, static=small.PROJECTIONS),
        "hope_linear_no_writes": small.hope(vocab, small.LINEAR, writes=False),
        "deltanet": small.deltanet(vocab),
        "gated_deltanet": small.gated_deltanet(vocab),
        "transformer": small.transformer(vocab),
    }


class Story(NamedTuple):
    """A story with its questions.

    Attributes:
      words: of its lines in turn, each answer after its question.
      answers: places of the answers among the words.
    """

    words: tuple[str, ...]
    answers: tuple[int, ...]


def stories(lines: list[str]) -> list[Story]:
    """The stories of a bAbI file, each once; a line numbered 1 begins one."""
    found: list[tuple[list[str], list[int]]] = []
    for line in lines:
        number, rest = line.strip().split(" ", 1)
        if number == "1" or not found:
            found.append(([], []))
        words, answers = found[-1]
        text, *answer = rest.split("\t")
        words += re.findall(r"[a-z]+|[.?]", text.lower())
        if answer:
            answers.append(len(words))
            words.append(answer[0].strip().lower())
    return list(dict.fromkeys(Story(tuple(words), tuple(answers)) for words, answers in found))


def read(task: str, data: Path) -> list[Story]:
    """The stories of a task.

    Raises:
      DataError: its file is not there.
    """
    paths = sorted(data.glob(f"{task}_*train.txt*"))
    if not paths:
        raise DataError(f"no {task}_*_train.txt.gz in {data}: give the folder en-10k of bAbI")
    opened = gzip.open if paths[0].suffix == ".gz" else open
    with opened(paths[0], "rt") as file:
        return stories(file.readlines())


def rows(told: list[Story], ids: dict[str, int], length: int) -> trials.Batch:
    """One story a row, cut at `length` tokens; 0 fills up, and nothing is asked of it.

    The weights are such that the loss is the mean over words plus the mean over answers.
    """
    words = np.zeros((len(told), length + 1), np.int32)
    asked = np.zeros((len(told), length), bool)
    for row, story in enumerate(told):
        cut = story.words[: length + 1]
        words[row, : len(cut)] = [ids[word] for word in cut]
        asked[row, [place - 1 for place in story.answers if place <= length]] = True
    targets = words[:, 1:]
    weights = (targets > 0) / (targets > 0).sum() + asked / max(asked.sum(), 1)
    return {
        "tokens": words[:, :-1],
        "targets": targets,
        "asked": asked,
        "weights": weights.astype(np.float32),
    }


def draw(
    rng: np.random.Generator, *, told: list[Story], ids: dict[str, int], length: int
) -> trials.Batch:
    """A training batch: stories drawn with replacement."""
    return rows([told[k] for k in rng.integers(0, len(told), BATCH)], ids, length)


def make(task: str, length: int, *, data: Path = DATA) -> trials.Task:
    """One task: 90% of its stories for training, 5% to choose the rate, 5% to report."""
    told = read(task, data)
    told = [told[k] for k in np.random.default_rng(trials.HELDOUT).permutation(len(told))]
    ids = {word: k + 1 for k, word in enumerate(sorted({w for s in told for w in s.words}))}
    cut, middle = int(len(told) * 0.9), int(len(told) * 0.95)

    def batches(part: list[Story]) -> list[trials.Batch]:
        # Of one shape: the last stories too few for a batch are left out.
        starts = range(0, len(part) - len(part) % BATCH, BATCH)
        return [rows(part[k : k + BATCH], ids, length) for k in starts]

    return trials.Task(
        about=f"bAbI {task}, {len(told)} stories, length {length}, batch {BATCH}",
        vocab=len(ids) + 1,
        shape=(BATCH, length),
        draw=functools.partial(draw, told=told[:cut], ids=ids, length=length),
        loss=trials.answers,
        heldout={"chosen by": batches(told[cut:middle])},
        final={"unseen": batches(told[middle:])},
    )


def tasks(**lengths: int):
    """Name -> what makes the task."""
    return {task: functools.partial(make, task, length) for task, length in lengths.items()}


LENGTHS = {"qa1": 92, "qa2": 224, "qa4": 24, "qa5": 224}  # all of 1 and 4, nine in ten of 2 and 5
LONG = LENGTHS | {"qa2": 512, "qa5": 832}  # all
RATES = (2e-3, 4e-3, 8e-3)
TASKS = {
    "smoke": tasks(qa1=92),
    "cpu": tasks(**LENGTHS),
    "gpu": tasks(**LONG),
    "tpu": tasks(**LONG),
}


def plan(steps: int, every: int, rates=RATES, seeds=(0, 1, 2)) -> trials.Plan:
    """The training of every model."""
    return trials.Plan(steps, every, rates, seeds, 40, "cosine", 0.1)


PLANS = {
    "smoke": lambda task: plan(6, 3, (4e-3,), (0,)),
    "cpu": lambda task: plan(500, 25),
    "gpu": lambda task: plan(3000, 50),
    "tpu": lambda task: plan(3000, 50),
}


def main() -> None:
    reports.run(
        "babi",
        __doc__,
        tasks=TASKS,
        plans=PLANS,
        configs=lambda task: configs(task.vocab),
        names=tuple(configs(2)),
        data=DATA,
        least=0.9,
        title="bAbI: answers right in unseen stories, by training step",
    )


if __name__ == "__main__":
    main()
