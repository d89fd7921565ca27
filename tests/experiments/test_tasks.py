"""The labels of each task, against definitions written apart."""

import itertools
import re

import numpy as np
import pytest

from experiments import babi, formal_languages, recall
from nestedjax.data import DataError


def test_recall_asks_for_the_value_that_the_row_gave_the_key():
    batch = recall.draw(np.random.default_rng(0), length=24, pairs=4, symbols=16, batch=50)
    assert batch["tokens"].shape == (50, 24) and batch["tokens"].dtype == np.int32
    for tokens, targets, asked in zip(
        batch["tokens"], batch["targets"], batch["asked"], strict=True
    ):
        told = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
        assert len(told) == 4, "a key is given twice"
        assert {*told} <= {*range(16)} and {*told.values()} <= {*range(16, 32)}
        assert asked.tolist() == [False] * 8 + [True] * 16
        assert [told[key] for key in tokens[8:]] == targets[8:].tolist()
    np.testing.assert_allclose(batch["weights"].sum(), 1, rtol=1e-5)
    assert {*batch["weights"][batch["asked"]]} == {batch["weights"].max()}


LINES = """\
1 Mary went to the hall.
2 Where is Mary? \thall\t1
3 John took it there.
4 Where is John? \thall\t1 3
1 Bill sat.
2 Where is Bill? \tden\t1
1 Bill sat.
2 Where is Bill? \tden\t1
""".splitlines()


def test_stories_of_babi_are_told_once_with_their_answers():
    first, second = babi.stories(LINES)
    said = "mary went to the hall . where is mary ? hall john took it there . where is john ? hall"
    assert " ".join(first.words) == said
    assert [(first.words[place - 1], first.words[place]) for place in first.answers] == [
        ("?", "hall"),
        ("?", "hall"),
    ]
    assert second == babi.Story(tuple("bill sat . where is bill ? den".split()), (7,))


def test_rows_of_babi_ask_for_the_answers_inside_the_cut():
    told = babi.stories(LINES)
    ids = {word: k + 1 for k, word in enumerate(sorted({w for s in told for w in s.words}))}
    batch = babi.rows(told, ids, 12)
    word = {k: name for name, k in ids.items()}
    for row, story in enumerate(told):
        places = np.flatnonzero(batch["asked"][row])
        assert [word[batch["targets"][row, p]] for p in places] == ["hall" if row == 0 else "den"]
        assert [word[batch["tokens"][row, p]] for p in places] == ["?"]
        shown = [word[k] for k in batch["tokens"][row] if k]
        assert shown == [*story.words][: len(shown)]
    losses = np.random.default_rng(0).random(batch["targets"].shape)
    words, answers = batch["targets"] > 0, batch["asked"]
    expected = losses[words].mean() + losses[answers].mean()
    np.testing.assert_allclose((losses * batch["weights"]).sum(), expected, rtol=1e-5)


def test_babi_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="no qa1_.* in .*: give the folder en-10k"):
        babi.make("qa1", 92, data=tmp_path)


def balanced(string, pair):
    """Whether the brackets of one kind, taken out of a string, are a Dyck word."""
    only = "".join(symbol for symbol in string if symbol in pair)
    while pair in only:
        only = only.replace(pair, "")
    return not only


BELONGS = {
    "parity": lambda s: re.fullmatch(r"0*(10*10*)*", s),
    "aa": lambda s: re.fullmatch(r"(aa)*", s),
    "abab": lambda s: re.fullmatch(r"(abab)*", s),
    "anbn": lambda s: s == "a" * (len(s) // 2) + "b" * (len(s) // 2),
    "anbncn": lambda s: s == "".join(x * (len(s) // 3) for x in "abc"),
    "shuffle2": lambda s: balanced(s, "()") and balanced(s, "[]"),
}


@pytest.mark.parametrize("name", formal_languages.LANGUAGES)
def test_legal_symbols_are_those_with_which_a_string_of_the_language_goes_on(name):
    language, longest = formal_languages.LANGUAGES[name], 8 if name == "shuffle2" else 12
    lengths = range(1, longest + 1)
    words = {
        word
        for n in lengths
        for word in map("".join, itertools.product(language.symbols, repeat=n))
        if BELONGS[name](word)
    }
    nexts: dict[str, set[str]] = {}
    for word in words:
        for place in range(1, len(word) + 1):
            following = word[place : place + 1] or formal_languages.END
            nexts.setdefault(word[:place], set()).add(following)
    # Every way on from a string is in one that is longer by no more than four symbols.
    short = {
        word[:n] for word in words if len(word) <= longest - 4 for n in range(1, len(word) + 1)
    }
    assert short
    for prefix in short:
        assert {*language.legal(prefix)} == nexts[prefix], prefix


@pytest.mark.parametrize("name", formal_languages.LANGUAGES)
def test_drawn_strings_are_of_the_language_and_of_the_bin(name):
    language = formal_languages.LANGUAGES[name]
    batch = formal_languages.draw(
        np.random.default_rng(1), language=language, low=2, high=50, batch=60
    )
    lengths = batch["asked"].sum(1)
    assert lengths.min() >= 2 and lengths.max() <= 50 and len({*lengths.tolist()}) > 5
    for tokens, length, legal in zip(batch["tokens"], lengths, batch["legal"], strict=True):
        string = "".join(language.symbols[k] for k in tokens[:length])
        assert BELONGS[name](string), string
        assert legal[length - 1, -1], "a whole string may end"
        followed = legal[np.arange(length - 1), tokens[1:length]]
        assert followed.all(), "what follows was not legal"


def test_a_string_is_right_only_if_all_of_its_sets_are():
    language = formal_languages.LANGUAGES["anbn"]
    batch = formal_languages.encode(language, ["aabb", "ab"], 4)
    logits = np.where(batch["legal"], 2.0, -2.0).astype(np.float32)
    logits[1, 2:] = 9.0  # behind the end of the second string
    _, metrics = formal_languages.loss(logits, batch)
    assert float(metrics["accuracy"]) == 1
    logits[0, 1, 2] = 0.5
    _, metrics = formal_languages.loss(logits, batch)
    assert float(metrics["accuracy"]) == 0.5
