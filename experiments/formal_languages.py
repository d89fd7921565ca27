"""Formal languages: which memory keeps track of a state, and at lengths it was not trained on.

Claim under test: HOPE recognises all six languages at the training lengths and most of them at
twice the length, where DeltaNet and Transformer++ fail on parity, (aa)* and (abab)* (spec G5,
Table 5; published there, lengths 2-50 / 51-100, percent of strings: LSTM, SRWM and HOPE 100 / 100
everywhere; Transformer parity 46.4 / 0, DeltaNet parity 98.2 / 10.1, both 0 / 0 on (aa)* and
(abab)*, 100 on the counters and the shuffle).

Command:   python -m experiments.formal_languages --scale cpu   (a part: --tasks parity)
Data:      generated: strings of the language, of every length from 2 to 50 as often; at each symbol
           the model says which symbols may come next, the end among them; a string is right if all
           of its sets are. Held out: lengths 2-50, 51-100 (published) and 101-500 (ours)
Protocol:  one block of width 64 with 4 heads, HOPE at one write a token; AdamW (b2 0.98, weight
           decay 0.01, clip 1), warm-up of 50 steps, then constant; batch 32; embeddings of standard
           deviation 1 (`small_models`); each model at the best of the same rates on seed 0, first
           bin, then three seeds
Hardware:  2 CPU cores; --scale gpu and tpu are meant for one chip
Output:    a table, `formal_languages.json`, `formal_languages.png` and the finished cells in --out
           (started again, it goes on); what was found is in LOG.md
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import reports, trials
from experiments import sequence_layers as rivals
from experiments import small_models as small
from nestedjax import models

BATCH = 32
BINS = {"2-50": (2, 50), "51-100": (51, 100), "101-500": (101, 500)}
END = "."


def configs(vocab: int) -> dict[str, models.ModelConfig]:
    """What is compared, by name.

    Args:
      vocab: tokens of the task.
    """
    sizes = (vocab, small.WIDTH, 1, small.HIDDEN)
    return {
        "hope": small.hope(vocab, layers=1),
        "hope_linear": small.hope(vocab, small.LINEAR, layers=1),
        "deltanet": small.deltanet(vocab, layers=1),
        "deltanet_to_2": rivals.ReflectingDeltaNetConfig(
            *sizes, small.HEADS, 32, small.CONV, **small.EMBEDDING
        ),
        "transformer": small.transformer(vocab, layers=1),
        "lstm": rivals.LSTMConfig(*sizes, **small.EMBEDDING),
        "srwm": rivals.SelfReferentialConfig(*sizes, small.HEADS, **small.EMBEDDING),
    }


class Language(NamedTuple):
    """A language.

    Attributes:
      symbols: of its strings.
      step: its lengths are the multiples of this.
      string: `string(rng, length)`, one of its strings.
      legal: `legal(prefix)`, the symbols that may come next, `END` among them if none need to;
        prefixes of its strings only, not the empty one.
    """

    symbols: str
    step: int
    string: Callable[[np.random.Generator, int], str]
    legal: Callable[[str], str]


def _parity(rng: np.random.Generator, length: int) -> str:
    bits = rng.integers(0, 2, length)
    bits[-1] = bits[:-1].sum() % 2
    return "".join(map(str, bits))


def _shuffle(rng: np.random.Generator, length: int) -> str:
    """Brackets of two kinds, each balanced by itself: opened and closed by chance as they can."""
    string, depths = "", [0, 0]
    for left in range(length, 0, -1):
        depth = sum(depths)
        if depth == left or (depth and rng.random() < 0.5):
            kind = int(rng.random() * depth >= depths[0])
            string, depths[kind] = string + ")]"[kind], depths[kind] - 1
        else:
            kind = int(rng.integers(0, 2))
            string, depths[kind] = string + "(["[kind], depths[kind] + 1
    return string


def _after_counts(prefix: str) -> str:
    """a^n b^n."""
    a, b = (prefix.count(symbol) for symbol in "ab")
    return "ab" if not b else "b" if b < a else END


def _after_three_counts(prefix: str) -> str:
    """a^n b^n c^n."""
    a, b, c = (prefix.count(symbol) for symbol in "abc")
    return "ab" if not b else "b" if b < a else "c" if c < a else END


def _after_brackets(prefix: str) -> str:
    """Shuffle-2."""
    open_ = {kind: prefix.count(kind[0]) > prefix.count(kind[1]) for kind in ("()", "[]")}
    closing = "".join(kind[1] for kind, more in open_.items() if more)
    return "([" + (closing or END)


LANGUAGES = {
    "parity": Language("01", 1, _parity, lambda p: "01" + END * (p.count("1") % 2 == 0)),
    "aa": Language("a", 2, lambda _, n: "a" * n, lambda p: "a" + END * (len(p) % 2 == 0)),
    "abab": Language(
        "ab", 4, lambda _, n: "ab" * (n // 2), lambda p: ("a" + END, "b", "a", "b")[len(p) % 4]
    ),
    "anbn": Language("ab", 2, lambda _, n: "a" * (n // 2) + "b" * (n // 2), _after_counts),
    "anbncn": Language(
        "abc", 3, lambda _, n: "".join(s * (n // 3) for s in "abc"), _after_three_counts
    ),
    "shuffle2": Language("([)]", 2, _shuffle, _after_brackets),
}


def encode(language: Language, strings: list[str], length: int) -> trials.Batch:
    """Strings as rows of `length` tokens: `tokens`, the sets `legal` [B, T, V], `asked` [B, T]."""
    ids = {symbol: k for k, symbol in enumerate(language.symbols + END)}
    tokens = np.zeros((len(strings), length), np.int32)
    legal = np.zeros((*tokens.shape, len(ids)), bool)
    asked = np.zeros(tokens.shape, bool)
    for row, string in enumerate(strings):
        tokens[row, : len(string)] = [ids[symbol] for symbol in string]
        asked[row, : len(string)] = True
        for place in range(len(string)):
            legal[row, place, [ids[s] for s in language.legal(string[: place + 1])]] = True
    return {"tokens": tokens, "legal": legal, "asked": asked}


def draw(
    rng: np.random.Generator, *, language: Language, low: int, high: int, batch: int = BATCH
) -> trials.Batch:
    """Strings of every possible length from `low` to `high` as often."""
    possible = [n for n in range(low, high + 1) if n % language.step == 0]
    strings = [language.string(rng, int(n)) for n in rng.choice(possible, batch)]
    return encode(language, strings, high)


def loss(logits: jax.Array, batch: trials.Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Binary cross-entropy of every set; a string is right if all of its sets are."""
    asked, legal = batch["asked"], batch["legal"]
    losses = optax.sigmoid_binary_cross_entropy(logits, legal.astype(logits.dtype)).mean(-1)
    right = jnp.all(((logits > 0) == legal).all(-1) | ~asked, axis=-1)
    metrics = {"accuracy": right.astype(jnp.float32).mean(), "tokens": jnp.asarray(right.size)}
    return jnp.mean(losses, where=asked), metrics


def make(name: str) -> trials.Task:
    """The task of a language: trained and measured on the first bin, at the end on the others."""
    language = LANGUAGES[name]
    sets = {}
    for of, (low, high) in BINS.items():
        rows = functools.partial(draw, language=language, low=low, high=high, batch=128)
        sets[of] = trials.heldout(rows, 1)
    low, high = BINS["2-50"]
    return trials.Task(
        about=f"{name}, lengths {low} to {high}, batch {BATCH}",
        vocab=len(language.symbols) + 1,
        shape=(BATCH, high),
        draw=functools.partial(draw, language=language, low=low, high=high),
        loss=loss,
        heldout={"2-50": sets.pop("2-50")},
        final=sets,
    )


ALL = {name: functools.partial(make, name) for name in LANGUAGES}
TASKS = {"smoke": {"parity": ALL["parity"]}, "cpu": ALL, "gpu": ALL, "tpu": ALL}
PLANS = {
    "smoke": lambda task: trials.Plan(6, 3, seeds=(0,)),
    "cpu": lambda task: trials.Plan(600, 25, (3e-3, 1e-2)),
    "gpu": lambda task: trials.Plan(8000, 100, (1e-3, 3e-3, 1e-2)),
    "tpu": lambda task: trials.Plan(8000, 100, (1e-3, 3e-3, 1e-2)),
}


def main() -> None:
    reports.run(
        "formal_languages",
        __doc__,
        tasks=TASKS,
        plans=PLANS,
        configs=lambda task: configs(task.vocab),
        names=tuple(configs(2)),
        least=1.0,
        title="Formal languages: strings of length 2-50 right, by training step",
    )


if __name__ == "__main__":
    main()
