"""No traceback ever reaches who uses the command line: random commands end with 0, 1 or 2.

A case is a command that works with up to two things changed: a flag, the text, the run's folder, or
its files. All is real up to the first compilation: flags, text, building the model and the
optimizer, the files of the run. What would compile is replaced (`stubbed`).
500 cases run here, always the same ones; NESTEDJAX_FUZZ=3000 runs as many new ones.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest

import nestedjax as nj
from nestedjax import checkpoint, training
from nestedjax.cli import main
from nestedjax.run import assemble, plots, trained
from nestedjax.run import training as running
from nestedjax.training import read_metrics
from tests.cli import tiny
from tests.cli.cases import CASES, PRESETS, prepared

LONG = int(os.environ.get("NESTEDJAX_FUZZ", "0"))
ENDS = {0: "done", 1: "training cannot go on", 2: "refused"}


class Loop:
    """In place of the training loop: it reads data and says what the loop says."""

    @staticmethod
    def train(loss_fn, state, *, dataset, config, valid, metrics, on_event, **_):
        on_event(training.Started(0, config.steps))
        next(iter(dataset.iterate(0)))
        on_event(training.Claimed(0))
        metrics.resume(0)
        metrics.write({"step": 1, "loss": 1.0, "grad_norm": 1.0}, {})
        metrics.flush()
        return training.Result(state, None, {"val_loss": 1.0})

    def __getattr__(self, name):
        return getattr(training, name)


def new_state(config, built, tx, mesh):
    """The shapes of a state, and the number of its step."""
    del mesh
    state = jax.eval_shape(lambda: assemble._first_state(config, built, tx))
    return state._replace(step=np.int32(config.loop.steps))


def draws(definition, tokens, *_):
    return lambda weights, prompt, key: np.full(min(tokens, 9), 65, np.int32)


def scores(definition):
    def score(weights, tokens, targets, state):
        return np.ones(targets.shape, np.float32), state

    return lambda weights: None, score


class Saved:
    """In place of the checkpoints of a run that is read."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def steps(self):
        return [12]

    def restore(self, like, **_):
        return checkpoint.Restored(12, like, {})


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory):
    built = {}

    def build(config):
        key = repr((config.model, config.seed, config.optimizer.name == "dgd"))
        if key not in built:
            built[key] = assemble.build(config)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (running, trained):
            patch.setattr(module, "build", build)
        patch.setattr(running, "training", Loop())
        patch.setattr(running, "new_state", new_state)
        patch.setattr(running, "Checkpoints", Saved)
        patch.setattr(trained, "Checkpoints", Saved)
        patch.setattr(running, "cached_sampler", draws)
        patch.setattr(trained, "cached_sampler", draws)
        patch.setattr(trained, "_scorer", scores)
        patch.setattr(plots, "plot_losses", lambda folder, *_, **__: read_metrics(folder))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory, stubbed):
    """A folder with a text and a run of each preset."""
    where = tmp_path_factory.mktemp("fuzz")
    (where / "book.txt").write_text(tiny.TEXT)
    (where / "book.model").write_bytes(b"not a model")
    before = Path.cwd()
    os.chdir(where)
    for preset, small in PRESETS.items():
        folder = f"runs/of_{preset}"
        made = ["train", preset, "--run", folder, *small, *tiny.RUN, "--data", "book.txt"]
        assert main(made) == 0
        (where / folder / "checkpoints").mkdir(exist_ok=True)
    yield where
    os.chdir(before)


def test_no_command_ends_in_a_traceback(place, capsys):
    """Every case ends with a code, and a refusal is one line on standard error."""
    ended = Counter()

    @hypothesis.settings(
        max_examples=LONG or 500,
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(CASES)
    def holds(case):
        arguments = prepared(place, case)
        code = main(arguments)
        _, err = capsys.readouterr()
        assert code in ENDS, (arguments, code)
        if code == 2:
            lines = [line for line in err.splitlines() if ": warning: " not in line]
            assert len(lines) == 1 and lines[0].startswith("nestedjax"), (arguments, err)
        ended[arguments[0], ENDS[code]] += 1

    holds()
    with capsys.disabled():
        if LONG:
            print(dict(ended))
    total = sum(ended.values())
    assert sum(n for (_, end), n in ended.items() if end == "done") > 0.25 * total


PROCESSES = [
    (0, ["--help"]),
    (0, ["train", "hope_nano", "--help"]),
    (0, ["levels", "transformer_nano"]),
    (2, ["trian"]),
    (2, ["train"]),
    (2, ["train", "hope_nano", "--lr", "1"]),
    (2, ["train", "hope_nano", "--steps", "3", "--steps", "4"]),
    (2, ["train", "hope_nano", "--layers", ""]),
    (2, ["train", "hope_nano", "--layers="]),
    (2, ["train", "hope_nano", "--run", "\udcff", "--width", "0"]),
    (2, ["train", "\udcff"]),
    (2, ["train", "hope_nano", "--data", "\udcff.txt"]),
    (2, ["train", "hope_nano", "--seed", str(2**63)]),
    (2, ["train", "hope_nano", "--mesh", "data=0"]),
    (2, ["train", "hope_nano", "--dtype", "float64"]),
    (2, ["train", "--config", "deep.json"]),
    (2, ["train", "--config", "/dev/null"]),
    (2, ["train", "hope_nano", "--batch", "16"]),
    (2, ["eval", "."]),
    (2, ["generate", ".", "--prompt", "\udcff"]),
]


def test_processes_end_as_this_one_does(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    environment = {**os.environ, "PYTHONPATH": str(Path(nj.__file__).parents[1]), "LC_ALL": "C"}
    program = "import sys; from nestedjax.cli import main; sys.exit(main(sys.argv[1:]))"
    for code, arguments in PROCESSES:
        command = [sys.executable, "-c", program, *arguments]
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert found.returncode == code, (arguments, found.stderr)
        assert b"Traceback" not in found.stderr + found.stdout
        if code == 2:
            assert found.stderr.count(b"\n") == 1 and found.stdout == b""
