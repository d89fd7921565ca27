"""`--optimizer NAME`: any optimizer trains a model, goes on to the last bit, and is named.

NESTEDJAX_OPTIMIZERS=all trains hope_nano with each of them; the suite, Transformer++ with M3.
"""

import os
import shutil

import jax
import numpy as np
import pytest

from nestedjax import optim, run
from nestedjax.checkpoint import Checkpoints
from nestedjax.training import read_metrics
from tests.cli.tiny import HOPE, RUN, TRANSFORMER, command, flags, refused

ALL = os.environ.get("NESTEDJAX_OPTIMIZERS") == "all"
TINY = ["hope_nano", *HOPE] if ALL else ["transformer_nano", *TRANSFORMER]
MORE = {
    "m3": ["--optimizer.period", "3", "--learning-rate", "0.02"],
    "dgd": ["--learning-rate", "0.1"],
    "ggd": ["--learning-rate", "0.1"],
}


@pytest.mark.parametrize("name", optim.menu.OPTIMIZERS if ALL else ["m3"])
def test_it_trains_and_continues_to_the_last_bit(name, text, tmp_path, capsys):
    """Taken back to step 4, which is one step into a period of M3's slow momentum."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    chosen = flags(*TINY[1:], *RUN, "--optimizer", name, *MORE.get(name, []))
    arguments = ["train", TINY[0], "--data", text, *chosen]
    code, _, err = command(capsys, *arguments[:2], "--run", whole, *arguments[2:])
    assert code == 0, err
    records = read_metrics(whole)
    assert records[-1]["val_loss"] < records[0]["loss"]
    shutil.copytree(whole, again)
    for step in (8, 12):
        shutil.rmtree(again / "checkpoints" / str(step))
    code, _, err = command(capsys, *arguments[:2], "--run", again, *arguments[2:])
    assert code == 0, err
    losses = [[r["loss"] for r in read_metrics(f) if "loss" in r] for f in (whole, again)]
    assert losses[0] == losses[1][-len(losses[0]) :]
    like = run.abstract_state(run.require_config(whole))
    states = []
    for folder in (whole, again):
        with Checkpoints(folder / "checkpoints") as checkpoints:
            states.append(checkpoints.restore(like).state)
    jax.tree.map(_bitwise, *states)


def _bitwise(a, b):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("--optimizer m4", "--optimizer m4: expected one of adamw, adamuon"),
        ("--optimizer m3 --optimizer.beta 1", "no flag --optimizer.beta; did you mean --opt"),
        (
            "--optimizer adamw --optimizer.period 3",
            "--optimizer.period; adamw does not have it; these do: m3",
        ),
        ("--optimizer m3 --optimizer.b1 7", "b1=7.0 must be"),
        ("--optimizer m3 --optimizer.period x", "--optimizer.period x: expected a whole number"),
        ("--optimizer m3 --optimizer.accumulate x", "accumulate x: expected one of ema, sum"),
        ("--optimizer ggd --b1 0.5", "ggd leaves no parameters to another AdamW, so that b1"),
        ("--optimizer adamw --b1 0.5", "b1 would do nothing; set optimizer.b1"),
    ],
)
def test_mistakes_are_named(settings, message, text, tmp_path, capsys):
    start = ["train", "hope_nano", "--run", tmp_path / "r", "--data", text]
    assert message in refused(capsys, *start, *settings.split())
