"""Processes: two on one run, signals at bad moments, and streams that close."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nestedjax as nj
from nestedjax.training import read_metrics
from tests.cli.processes import CODE, arguments, environment, saved_steps
from tests.cli.tiny import command

pytestmark = pytest.mark.slow


def stopped_at(process):
    """The step that the last line names, all of which is saved."""
    assert "saved; continue with: " in process.out[-1], (process.out, process.err)
    return int(process.out[-1].split(" step ")[1].split(",")[0])


def test_one_process_at_a_time_trains_a_run(start, text, tmp_path, capsys):
    folder = tmp_path / "run"
    process = start(*arguments(folder, text))
    process.wait_for(lambda: saved_steps(folder))
    code, out, err = command(capsys, *arguments(folder, text))
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"process {process.running.pid} on {socket.gethostname()} (since 2" in err
    assert f"trains {folder}: wait for it or stop it" in err
    assert command(capsys, "generate", folder, "--tokens", 1)[0] == 0  # reading needs no lock
    process.send(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL and (folder / "lock").exists()
    # The kernel freed the lock: the next one takes over at once.
    process = start(*arguments(folder, text))
    process.wait_for(lambda: process.said("continues at step"))
    process.send(signal.SIGHUP)
    assert process.end() == 129 and not (folder / "lock").exists()
    step = stopped_at(process)
    assert nj.load(folder).step == step
    assert [record["step"] for record in read_metrics(folder)] == [*range(1, step + 1)]


def test_ctrl_c_is_heard_in_a_dispatch_and_the_second_ends_at_once(start, text, tmp_path, capsys):
    folder = tmp_path / "run"
    slow = ("--length", "512", "--batch", "16", "--steps-per-dispatch", "4000")
    assert command(capsys, *arguments(folder, text, *slow, "--steps", "1"))[0] == 0
    # The next dispatch takes far longer than this test.
    far = ("--steps", 4000, "--checkpoint-every", 4000, "--validate-every", 4000)
    process = start("train", "transformer_nano", "--run", folder, *far)
    process.wait_for(lambda: process.said("continues at step 1"))
    time.sleep(2)  # into the compiler or the dispatch, where no Python runs
    process.send(signal.SIGINT)
    process.wait_for(lambda: process.said("Ctrl-C: stopping after this dispatch, and saving;"), 3)
    process.send(signal.SIGINT)
    assert process.end(3) == 130 and process.err[-1] == "interrupted"
    assert nj.load(folder).step == 1 and saved_steps(folder) == [1]


def test_signals_during_a_save_lose_nothing(start, text, tmp_path):
    """It saves after every dispatch; the second signal falls into the last save."""
    folder = tmp_path / "run"
    process = start(*arguments(folder, text, "--checkpoint-every", "1"))
    process.wait_for(lambda: saved_steps(folder))
    process.send(signal.SIGTERM)
    process.wait_for(lambda: process.said("SIGTERM: stopping after this dispatch"))
    if process.running.poll() is None:
        process.send(signal.SIGTERM)
    assert process.end() == 143
    assert nj.load(folder).step == stopped_at(process)


def test_a_reader_that_goes_away_does_not_end_the_run(cache, text, tmp_path):
    """`| head -1`, in an encoding without the folder's name."""
    folder = tmp_path / "rün"
    given = [sys.executable, "-c", CODE, *map(str, arguments(folder, text, "--steps", "60"))]
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | head -2', "bash", *given],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env=os.environ | environment(cache) | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[1].startswith(f"{tmp_path}/r?n begins")
    assert nj.load(folder).step == 60
