"""Use of a trained run, against the model called by hand."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nestedjax as nj
from nestedjax import models, run
from nestedjax.errors import ConfigError
from nestedjax.layers import RuleConfig
from nestedjax.run.plots import plot_use
from nestedjax.run.use import asked
from tests.models import families
from tests.run import tiny

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 40
PAIRS = [("memories", "not_written"), ("projections", "frozen"), ("convolutions", "skipped")]


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "book.txt").write_text(TEXT)
    made = nj.run_preset("hope_nano", tiny.HOPE, files=folder / "book.txt", **tiny.RUN)
    return nj.train(made, folder / "run").trained


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXT[:251])
    (folder / "b.txt").write_text(TEXT[9:90])
    return [folder / "a.txt", folder / "b.txt"]


def by_hand(model, trained, files):
    """The losses of each row of 16 tokens, one by one."""
    found = []
    for file in files:
        tokens = np.frombuffer(file.read_bytes(), np.uint8).astype(np.int32)
        for first in range(0, tokens.size - 1, 16):
            row = tokens[first : first + 17]
            y = model(jnp.asarray(row[None, :-1]))[0][0]
            losses = optax.softmax_cross_entropy_with_integer_labels(y, row[1:])
            found.append(np.asarray(losses))
    return found


def test_deltas_and_errors_are_those_of_the_rows(trained, texts):
    found = nj.evaluate(trained, texts, use=PAIRS)
    assert [(row.name, row.switch) for row in found.use] == PAIRS
    plain = by_hand(trained.model, trained, texts)
    total = sum(row.size for row in plain)
    np.testing.assert_allclose(found.unswitched, np.concatenate(plain).mean(), rtol=1e-5)
    for row in found.use:
        model = models.switched(trained.model, {row.name: row.switch})
        other = by_hand(model, trained, texts)
        cost = np.array([b.sum() - a.sum() for a, b in zip(plain, other, strict=True)])
        sizes = np.array([a.size for a in plain])
        delta = cost.sum() / total
        np.testing.assert_allclose(row.loss, np.concatenate(other).mean(), rtol=1e-5)
        np.testing.assert_allclose(row.delta, delta, atol=2e-6)
        error = np.sqrt(len(cost) / (len(cost) - 1) * np.sum((cost - delta * sizes) ** 2)) / total
        np.testing.assert_allclose(row.standard_error, error, atol=2e-6)
    assert found.all == nj.evaluate(trained, texts).all  # which is one context a text


def test_gates_and_starts(trained, texts):
    found = nj.evaluate(trained, texts, use=PAIRS[:1])
    gates = {row.gate: row for row in found.gates}
    assert {*gates} == {"learning_rate", "decay", "projection_learning_rate"}
    for row in found.gates:
        assert row.name == "self_modifying" and 0 < row.least <= row.mean <= row.most < 1
    memory = trained.run.model.memory  # whose gates have hardly moved
    assert abs(gates["learning_rate"].mean - memory.learning_rate_start) < 0.1
    own = memory.projection_learning_rate
    assert abs(gates["projection_learning_rate"].mean - own) < 0.6 * own
    first = models.create(trained.run.model, seed=trained.run.seed)
    for row in found.starts:
        now, drawn = (models.memory_starts(model)[row.name] for model in (trained.model, first))
        step = math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(now, drawn, strict=True)))
        norm = math.sqrt(sum(float((b**2).sum()) for b in drawn))
        np.testing.assert_allclose(row.movement, step / norm, rtol=1e-4)
        assert 0 < row.movement < 1
    assert {row.name for row in found.starts} == {
        *("key", "learning_rate", "decay", "value", "memory")
    }


def test_without_use_there_are_no_rows(trained, texts):
    found = nj.evaluate(trained, texts)
    assert found.use == found.gates == found.starts == () and math.isnan(found.unswitched)


def test_the_same_switch_is_measured_once(trained, texts, monkeypatch):
    from nestedjax.run import use

    calls = []
    monkeypatch.setattr(use, "_scorer", lambda d, make=use._scorer: calls.append(d) or make(d))
    pairs = [("memories", "skipped"), ("self_modifying", "skipped")]
    a, b = nj.evaluate(trained, texts, use=pairs).use
    assert a[2:] == b[2:] and len(calls) == 2  # the model as it is, and without the layer


def test_mistakes_are_named_in_one_line(trained):
    for use, says in (
        ([("memorie", "frozen")], "the model has no memorie:frozen; it has key:not_written, "),
        ("memories", r"use='memories' must be True, or a list of \(name, switch\), such as"),
        ([("memories",)], "must be True, or a list"),
        (7, "use=7 must be True, or a list"),
    ):
        with pytest.raises(ConfigError, match=says) as error:
            asked(use, trained.model)
        assert "\n" not in str(error.value)


def test_the_picture_of_use(trained, tmp_path):
    from nestedjax.evaluation import Use

    rows = [Use("memory", "frozen", 2.0, 0.5, 0.1), Use("cms.0", "skipped", 9.0, 7.5, math.nan)]
    plot_use(rows, tmp_path / "use.png", title="tiny")
    assert (tmp_path / "use.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_writes(tmp_path):
    """It trains, goes on with the same setting, and its memories are never written."""
    (tmp_path / "book.txt").write_text(TEXT)
    changes = {**tiny.HOPE, "writes": False}
    made = nj.run_preset("hope_nano", changes, files=tmp_path / "book.txt", **tiny.RUN)
    done = nj.train(made, tmp_path / "run").trained
    assert not nj.load(tmp_path / "run").run.model.writes
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["writes"] is False
    with pytest.raises(ConfigError, match="writes"):
        other = dataclasses.replace(made, model=dataclasses.replace(made.model, writes=True))
        nj.train(other, tmp_path / "run")
    row = nj.evaluate(done, tmp_path / "book.txt", use=PAIRS[:1]).use[0]
    assert row.delta == 0
    with pytest.raises(ConfigError, match="has no memory that is written in context"):
        nj.run_preset("transformer_nano", {"writes": False})


def test_configurations_from_before_the_rule():
    """Five settings of a memory's rule lay beside its others; what is newer takes its default."""
    rule = RuleConfig(objective="dot", dgd="none", inner_clip=2.0)
    model = families.hope(families.STREAM, dataclasses.replace(families.MEMORY, rule=rule))
    new = run.to_json(nj.run_preset(model))
    old = json.loads(json.dumps(new))
    flat = ("objective", "dgd", "erase", "values", "inner_clip")
    kept = ("heads", "head_dim", "hidden", "chunk_size", "momentum", "read", "decay_bias")
    memory = old["model"]["memory"]
    memory = {n: memory[n] for n in kept} | {n: memory["rule"][n] for n in flat}
    old["model"]["memory"] = memory
    assert run.from_json(old) == run.from_json(new)
    memory["dgd"] = "all"
    with pytest.raises(ValueError, match=r"model.memory.rule.dgd='all' must be"):
        run.from_json(old)
    both = json.loads(json.dumps(new))
    both["model"]["memory"]["dgd"] = "none"
    with pytest.raises(ValueError, match="unknown setting 'model.memory.dgd'"):
        run.from_json(both)
