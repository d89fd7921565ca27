"""kill -9 at random moments: the run started again each time is the run that never stopped.

NESTEDJAX_KILLS=10 kills more often than the once of the suite, NESTEDJAX_KILL_SEED draws other
moments, and NESTEDJAX_KILL_PRESET=hope_nano takes a model whose compilation is minutes.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nestedjax import run
from nestedjax.checkpoint import Checkpoints
from nestedjax.training import read_metrics
from tests.cli.processes import CODE, environment
from tests.cli.tiny import HOPE, HOPE_ATTENTION

PRESET = os.environ.get("NESTEDJAX_KILL_PRESET", "hope_attention_nano")
KILLS = int(os.environ.get("NESTEDJAX_KILLS", "1"))
SEED = int(os.environ.get("NESTEDJAX_KILL_SEED", "0"))
STEPS = 40 * KILLS
# The model's state is carried from step to step, and most checkpoints fall between two writes of a
# continuum block.
SETTINGS = (
    f"--steps {STEPS} --checkpoint-every 5 --validate-every 20 --steps-per-dispatch 3"
    " --order contiguous --length 16 --batch 4 --microbatches 2 --learning-rate 0.01"
    " --sample-every none --validation-batches 2 --optimizer adamw"
).split()
SETTINGS += HOPE if PRESET == "hope_nano" else HOPE_ATTENTION


def start(folder, text, cache):
    command = ["train", PRESET, "--run", folder, "--data", text, *SETTINGS]
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment(cache),
        cwd=Path(__file__).parents[2],
    )


def finish(process):
    out, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err
    assert out.splitlines()[-1].startswith(f"done: step={STEPS} "), out
    return out


def recorded(folder):
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill_at(process, folder, step, delay):
    """Kill once that many steps are recorded and a moment has passed."""
    for line in process.stdout:  # as far as the loop: what is recorded is then this process's
        if "compiling" in line:
            break
    while recorded(folder) < step and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"


def final_state(folder):
    like = run.abstract_state(run.require_config(folder))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        restored = checkpoints.restore(like)
    assert restored.step == STEPS
    return restored.state._replace(key=jax.random.key_data(restored.state.key))


@pytest.mark.slow
def test_killed_runs_end_bit_for_bit_the_same(text, tmp_path):
    finish(start(tmp_path / "whole", text, tmp_path / "xla"))
    draw, moments = random.Random(SEED), []
    for number in range(KILLS):
        process = start(tmp_path / "killed", text, tmp_path / "xla")
        last = STEPS * (number + 1) // (KILLS + 1)
        step = draw.randrange(STEPS * number // (KILLS + 1), last)
        kill_at(process, tmp_path / "killed", step, draw.uniform(0, 0.2))
        moments.append(recorded(tmp_path / "killed"))
    print("killed with this many steps recorded:", *moments)
    finish(start(tmp_path / "killed", text, tmp_path / "xla"))

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert [r["step"] for r in read_metrics(killed)] == list(range(1, STEPS + 1))
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    left, right = (jax.tree_util.tree_leaves_with_path(final_state(f)) for f in (whole, killed))
    paths = {jax.tree_util.keystr(path) for path, _ in left}
    assert any("acc_grads" in path for path in paths) and any("carry" in path for path in paths)
    for (path, one), (_, other) in zip(left, right, strict=True):
        same = np.asarray(one).tobytes() == np.asarray(other).tobytes()
        assert same, jax.tree_util.keystr(path)
