"""What experiments on small tasks share: the models, the cells, the command line."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import ablations, babi, formal_languages, recall, reports, trials
from experiments import sequence_layers as rivals
from experiments import small_models as small
from nestedjax import models
from nestedjax.errors import ConfigError

TABLES = {
    "recall": recall.configs(8),
    "babi": babi.configs(8),
    "formal_languages": formal_languages.configs(8),
    "ablations": ablations.configs(8, step_tokens=64),
}
NEEDED = {
    "recall": {
        "hope",
        "hope_linear",
        "deltanet",
        "gated_deltanet",
        "transformer",
        "no_writes",
    },
    "babi": {
        f"{of}{how}" for of in ("hope", "hope_linear") for how in ("", "_static", "_no_writes")
    },
    "formal_languages": {"hope", "hope_linear", "deltanet_to_2", "transformer", "lstm", "srwm"},
    "ablations": {"hope", "no_writes", "no_cms", "no_convolution", "transformer"},
}


@pytest.mark.parametrize("name", TABLES)
def test_the_models_of_a_table_have_equal_sizes(name):
    table = TABLES[name]
    assert NEEDED[name] <= {*table}
    assert len({(c.vocab, c.width, c.layers) for c in table.values()}) == 1
    for model, config in table.items():
        made = models.abstract(lambda config=config: models.create(config))
        network = made.blocks[0].feed_forward
        cms = config.continuum
        hidden = config.hidden if cms is None else cms.hidden * len(cms.periods)
        assert hidden == small.HIDDEN and network is not None, model


@pytest.mark.parametrize(("name", "written"), [("no_writes", False), ("hope", True)])
def test_without_writes_no_value_reaches_the_output(name, written):
    """Values are what is written, and nothing else sees them."""
    model = models.create(recall.configs(8)[name])
    definition, weights = models.split(model)
    tokens = jnp.arange(12)[None] % 8

    def other(path, leaf):
        values = "values" in jax.tree_util.keystr(path)
        return -2 * leaf if values else leaf

    changed = jax.tree_util.tree_map_with_path(other, weights)
    before, after = (models.merge(definition, w)(tokens)[0] for w in (weights, changed))
    difference = float(jnp.max(jnp.abs(before - after)))
    assert difference > 1e-3 if written else difference == 0.0


def test_the_row_without_a_convolution_has_none():
    table = TABLES["ablations"]
    made = models.abstract(lambda: models.create(table["no_convolution"]))
    whole = models.abstract(lambda: models.create(table["hope"]))
    difference = models.parameter_count(whole) - models.parameter_count(made)
    assert difference == small.LAYERS * small.CONV * 3 * small.WIDTH


@pytest.fixture
def lax_promotion():
    """optax multiplies floats with integer counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def no_compilation_cache():
    """The command line sets one up in its folder."""
    before = {name: getattr(jax.config, name) for name in CACHE}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, arguments)])
    recall.main()


@pytest.mark.usefixtures("lax_promotion")
def test_a_smoke_run_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    options = ("--scale", "smoke", "--models", "transformer", "--out", tmp_path)
    start(monkeypatch, *options)
    (path,) = (tmp_path / "cells").iterdir()
    before = path.read_bytes(), path.stat().st_mtime_ns
    (row,) = json.loads((tmp_path / "recall.json").read_text())
    assert [entry["step"] for entry in row["curve"]] == [3, 6] and row["seed"] == 0
    assert (tmp_path / "recall.png").stat().st_size > 5000
    start(monkeypatch, *options, "--seeds", 0, 1, "--rates", "3e-3")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    first, second = json.loads((tmp_path / "recall.json").read_text())
    assert first == row and second["seed"] == 1
    out = capsys.readouterr().out
    assert "| 32x4 | transformer | " in out and "| 2 |" in out
    path.write_text(json.dumps(row | {"steps": 7}))
    with pytest.raises(SystemExit):
        start(monkeypatch, *options)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is of another steps: give another --out" in error


@pytest.mark.usefixtures("lax_promotion")
def test_a_run_is_the_same_twice():
    task, plan = recall.make(32, 4), trials.Plan(12, 4, warmup=1)
    config = recall.configs(task.vocab)["transformer"]
    first, again, other = (trials.fit(config, task, plan, rate=1e-2, seed=s) for s in (1, 1, 2))
    assert first["curve"] == again["curve"] != other["curve"]


@pytest.mark.usefixtures("lax_promotion")
def test_a_task_with_an_answer_is_learned():
    def draw(rng):
        tokens = rng.integers(0, 4, (16, 8)).astype(np.int32)
        asked = np.ones(tokens.shape, bool)
        weights = np.full(tokens.shape, 1 / tokens.size, np.float32)
        return {"tokens": tokens, "targets": 3 - tokens, "asked": asked, "weights": weights}

    task = trials.Task("mirror", 4, (16, 8), draw, trials.answers, {"a": trials.heldout(draw, 1)})
    found = trials.fit(
        rivals.LSTMConfig(4, 16, 1, 16), task, trials.Plan(100, 50, warmup=5), rate=1e-2, seed=0
    )
    assert found["accuracy"] == {"a": 1.0} and trials.score(found) == 1 and not found["error"]
    assert reports.passed(found, 0.9) in (50, 100)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scale", "large"), "invalid choice: 'large'"),
        (("--scale", "smoke", "--tasks", "64x8"), "--scale smoke has no task 64x8: it has 32x4"),
        (("--seeds", "-1"), "give seeds from 0"),
        (("--rates", "0"), "give learning rates above 0"),
        (("--models", "hop"), "invalid choice: 'hop'"),
    ],
)
def test_bad_arguments_are_one_line(monkeypatch, capsys, tmp_path, arguments, words):
    with pytest.raises(SystemExit) as caught:
        start(monkeypatch, "--out", tmp_path, *arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and words in error


def row(rate, seed, accuracy, curve=(), error=None):
    return {
        "task": "t",
        "model": "m",
        "parameters": 10,
        "learning_rate": rate,
        "seed": seed,
        "accuracy": {} if error else {"a": accuracy, "b": accuracy / 2},
        "curve": [{"step": step, "a": a} for step, a in curve],
        "seconds": 1.0,
        "error": error,
    }


def test_the_rate_of_all_seeds_is_the_best_of_the_first():
    rows = [row(1.0, 0, 0.5), row(2.0, 0, 0.7), row(4.0, 0, 0.0, error="nan"), row(2.0, 1, 0.1)]
    assert reports.chosen(rows) == {("t", "m"): [rows[1], rows[3]]}


def test_the_table_says_when_each_seed_passed_and_which_diverged():
    rows = [row(1.0, 0, 0.95, [(2, 0.5), (4, 0.9), (6, 0.8)]), row(1.0, 1, 0, error="nan")]
    (line,) = reports.report(rows, least=0.9).splitlines()[2:]
    assert "2, 1 diverged" in line and "4 / never" in line
    assert "a 0.950 (0.950, 0.950); b 0.475 (0.475, 0.475)" in line


def test_a_cell_of_other_settings_is_refused(tmp_path):
    about = {"task": "t", "model": "m", "learning_rate": 1e-3, "seed": 0, "steps": 5}
    assert trials.cell(tmp_path, about, lambda: {"x": 1}) == about | {"x": 1}
    assert trials.cell(tmp_path, about, lambda: 1 / 0) == about | {"x": 1}
    with pytest.raises(ConfigError, match="of another steps: give another --out"):
        trials.cell(tmp_path, about | {"steps": 6}, lambda: {})


def test_the_self_referential_matrix_is_its_equation():
    config = rivals.SelfReferentialConfig(4, 8, 1, 8, heads=2)
    layer = rivals.SelfReferential(config, 2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
    found, _ = layer(jnp.asarray(x))
    softmax = lambda z: np.exp(z) / np.exp(z).sum()  # noqa: E731
    w = np.array(layer.start[...], np.float64)
    reads = np.zeros((5, 8))
    for t in range(5):
        for h in range(2):
            out = w[h] @ softmax(x[0, t, 4 * h : 4 * h + 4])
            reads[t, 4 * h : 4 * h + 4], k, q, b = out[:4], out[4:8], out[8:12], out[12:]
            rates = np.repeat(1 / (1 + np.exp(-b)), [4, 4, 4, 4])
            change = w[h] @ softmax(q) - w[h] @ softmax(k)
            w[h] = w[h] + np.outer(rates * change, softmax(k))
    np.testing.assert_allclose(found[0], reads @ np.array(layer.out[...]), atol=1e-5)


@pytest.mark.parametrize("config", [rivals.LSTMConfig, rivals.SelfReferentialConfig])
def test_one_call_is_many(config):
    model = models.create(config(4, 8, 2, 8))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, 7)), jnp.int32)
    whole, _ = model(tokens)
    first, state = model(tokens[:, :3])
    second, _ = model(tokens[:, 3:], state)
    np.testing.assert_allclose(whole, jnp.concatenate([first, second], 1), atol=1e-5)


def test_a_delta_net_to_2_reflects():
    config = formal_languages.configs(4)["deltanet_to_2"]
    made = models.abstract(lambda: models.create(config))
    assert made.blocks[0].mixer.gates["learning_rate"].maximum == 2
