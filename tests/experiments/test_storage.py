"""The storage probe: what it hands to the library, and the facts that it stands for."""

import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import storage
from pallas_kernels.mlp_memory import CHOICES

ROWS, REFUSED = storage.rows()
MENU = {
    "objective",
    "values",
    "targets",
    "written",
    "dgd",
    "erase",
    "step",
    "clip",
    "decay_to",
    "architecture",
    "hidden",
    "inner_scale",
    "momentum",
}


def find(name, section="presets"):
    (row,) = (row for row in ROWS if (row.section, row.name) == (section, name))
    return row


@functools.cache
def means(name, section="presets"):
    found = storage.measure(find(name, section), draws=100)
    return {score: each.mean((1, 2)) for score, each in found.items()}


RATE = {rate: index for index, rate in enumerate(storage.RATES)}


def test_the_delta_rule_and_the_write_of_hope_nano_answer():
    assert means("delta rule")["right"][RATE[0.5]] > 0.95
    assert means("hope_nano")["right"][RATE[0.5]] > 0.85
    assert means("hope_nano")["cosine"][RATE[1.0]] > 0.7


@pytest.mark.parametrize("name", ["hope_nano_literal", "published write"])
def test_the_published_write_does_not(name):
    section = "earlier study" if name == "published write" else "presets"
    found = means(name, section)
    assert found["top 2"].max() < 0.4 and found["cosine"].max() < 0.15
    assert found["right"][RATE[1.0]] < 0.5


def test_without_writes_the_answers_are_by_chance():
    found = means("hope_nano, nothing written")
    assert np.abs(found["top 2"] - 1 / 6).max() < 0.06 and np.abs(found["cosine"]).max() < 0.06


def test_what_the_earlier_study_found_is_found_again():
    """But for rate 0.1, which was 1/9 there; five standard errors of 100 draws."""
    for name, then in storage.EARLIER.items():
        found = means(name, "earlier study")
        for rate, (right, cosine) in then.items():
            slack = 0.15 if rate == 0.1 else 0.1
            assert abs(found["right"][RATE[rate]] - right) < slack, (name, rate)
            assert abs(found["cosine"][RATE[rate]] - cosine) < 0.08, (name, rate)


@pytest.mark.parametrize("base", storage.BASES)
def test_every_choice_of_the_menu_is_changed_or_refused(base):
    section = f"{base} with"
    names = [row.name for row in ROWS if row.section == section]
    names += [row["name"] for row in REFUSED if row["section"] == section]
    parts = {part for name in names for part in name.split(", ")}
    assert {part.split()[0] for part in parts} >= MENU
    rule = storage.preset(base).rule
    for field, choices in CHOICES.items():
        if field == "read":  # is no choice of the write
            continue
        own = () if field in ("clip", "decay_to") else (getattr(rule, field),)
        for choice in choices:
            assert (f"{field} {choice}" in parts) == (choice not in own), (field, choice)
    assert all(row["reason"] for row in REFUSED)


def gelu(z):
    bent = np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    slope = 0.5 * z * (1 - bent**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    return 0.5 * z * (1 + bent), 0.5 * (1 + bent) + slope


@pytest.mark.parametrize("name", storage.BASES)
def test_what_is_written_and_read_is_the_recurrence(name):
    """Token by token in NumPy: published without its clip, or U alone, normalised and once."""
    memory, length = storage.preset(name), storage.ASKED + storage.LATER
    published = name == "hope_nano_literal"
    starts, pairs = storage.drawn(memory, 1, 3)
    start, (keys, values) = jax.tree.map(lambda a: a[0], (starts, pairs))
    rates = np.where(np.arange(length) < storage.ASKED, 0.5, 0.05).astype(np.float32)
    tokens = {"keys": keys, "values": values, "learning_rate": jnp.asarray(rates)}
    tokens["decay"] = jnp.ones(length)
    targets, said = storage.written(memory, start, tokens, 1)

    v, u = (np.array(start[name][0], np.float64) for name in ("inner", "outer"))
    expected = []
    for key, value, rate in zip(*np.array(pairs[0], np.float64), rates, strict=True):
        h, slope = gelu(v @ key)
        target = value + u @ gelu(v @ value)[0]
        expected.append(target)
        if published:
            error = key + u @ h - target
            back = (u.T @ error) * slope
            erased = rate / max(1, rate * h @ h) * np.outer(u @ h, h)
            u = u - erased - rate * np.outer(error, h)
            v = v - rate * np.outer(v @ key + back, key)
        else:
            error = key + u @ h - target / np.linalg.norm(target)
            u = u - rate / (h @ h + 0.01) * np.outer(error, h)
    np.testing.assert_allclose(targets, expected, atol=2e-5)
    read = [key + u @ gelu(v @ key)[0] for key in np.array(keys[: storage.ASKED], np.float64)]
    np.testing.assert_allclose(said, read, atol=2e-5)


def test_what_is_not_finite_is_wrong():
    said = jnp.full((storage.ASKED, storage.WIDTH), jnp.nan)
    targets = jnp.eye(storage.ASKED + storage.LATER, storage.WIDTH)
    found = storage.scores(said, said, targets)
    assert all(float(each.sum()) == 0 for each in found.values())


def test_two_answers_are_allowed():
    """The first is wrong in M(k), second there, and right in M(k) - k; the others are right."""
    targets = jnp.eye(storage.ASKED + storage.LATER, storage.WIDTH)
    said = targets[: storage.ASKED].at[0, 5].set(2.0)
    moved = said.at[0, 5].set(0.0)
    without = storage.scores(said, None, targets)
    assert without["right"].tolist() == [0, 1, 1, 1] and without["top 2"].tolist() == [1] * 4
    assert storage.scores(said, moved, targets)["right"].tolist() == [1] * 4


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, arguments)])
    storage.main()


def test_a_run_writes_table_results_and_plot(monkeypatch, tmp_path, capsys):
    some = [find(name) for name in (*storage.BASES, "delta rule")]
    some += [find("objective l2", "hope_nano with"), find("written both", "hope_nano with")]
    some += [find("delta rule", "earlier study")]
    monkeypatch.setattr(storage, "rows", lambda: (some, REFUSED))
    start(monkeypatch, "--draws", 3, "--out", tmp_path)
    out = capsys.readouterr().out
    assert "| delta rule | " in out and "| - / 1.00 / 0.98 |" in out
    assert "The same as hope_nano: objective l2." in out
    assert "* momentum True: decay_to='start' is not defined with momentum" in out
    found = json.loads((tmp_path / "storage.json").read_text())
    assert found["draws"] == 3 and len(found["rows"]) == len(some)
    assert [row["idle"] for row in found["rows"]].count(True) == 1
    assert (tmp_path / "storage.png").stat().st_size > 5000


def test_bad_arguments_are_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        start(monkeypatch, "--draws", 0, "--out", tmp_path)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "no number from 1" in error
