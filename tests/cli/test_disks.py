"""Disks that fail under a run: it ends by itself, in one line, and what was saved loads."""

import resource
import shutil
import subprocess

import pytest

import nestedjax as nj
from nestedjax.training import read_metrics
from tests.cli.processes import arguments, fill, saved_steps, small_disk
from tests.cli.tiny import RUN, TRANSFORMER, command


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_room_continues_it(start, text, tmp_path, capsys):
    with small_disk(tmp_path / "disk") as disk:
        folder = disk / "run"
        process = start(*arguments(folder, text, "--steps", "1000"))
        process.wait_for(lambda: len(saved_steps(folder)) >= 3)
        filler = fill(disk)
        assert process.end() == 1
        *warned, last = process.err
        assert "could not be written to" in last and "No space left on device (step " in last
        assert all(": warning: cannot write " in line for line in warned) and len(warned) <= 2, (
            warned
        )
        kept = saved_steps(folder)
        assert kept and f"(step {kept[-1]} and those before it are whole)" in last
        assert nj.load(folder).step == kept[-1]
        filler.unlink()
        rest = ("--checkpoint-every", 1000, "--validate-every", 1000)
        code, out, _ = command(capsys, "train", "transformer_nano", "--run", folder, *rest)
        assert code == 0 and f"continues at step {kept[-1]}" in out
        assert not list((folder / "checkpoints").glob("*tmp*"))
        assert [record["step"] for record in read_metrics(folder)] == list(range(1, 1001))


@pytest.mark.slow
def test_metrics_without_room_cost_a_warning_each_and_signals_end_the_run(start, text, tmp_path):
    """Once a full disk hung the run in the queue of TensorBoard's writer, deaf to signals."""
    limit = 150_000  # bytes of a file: metrics and events grow beyond it, a checkpoint does not

    folder = tmp_path / "run"
    process = start(*arguments(folder, text, "--checkpoint-every", "100"))
    resource.prlimit(process.running.pid, resource.RLIMIT_FSIZE, (limit, limit))
    process.wait_for(lambda: sum("cannot write" in line for line in process.err) == 2)
    told = len(saved_steps(folder)) and saved_steps(folder)[-1]
    process.wait_for(lambda: saved_steps(folder)[-1] > told + 200)  # training goes on
    process.send()
    assert process.end() == 143
    *warned, stopping = process.err
    assert sorted(line.split(" from ")[0].split(" (")[0] for line in warned) == [
        f"nestedjax train: warning: cannot write {folder}/{name}"
        for name in ("metrics.jsonl", "tensorboard")
    ]
    assert stopping == "SIGTERM: stopping after this dispatch, and saving"
    step = int(process.out[-1].split(" step ")[1].split(",")[0])
    assert nj.load(folder).step == step and 0 < len(read_metrics(folder)) < step


@pytest.mark.slow
def test_a_folder_that_is_removed_ends_the_run_and_is_not_made_again(start, text, tmp_path):
    folder = tmp_path / "run"
    process = start(*arguments(folder, text, "--checkpoint-every", "200"))
    process.wait_for(lambda: saved_steps(folder))
    folder.rename(tmp_path / "away")  # at once, as no removal is
    assert process.end() == 1
    assert len(process.err) == 1 and f"the run folder {folder} is gone" in process.err[0]
    assert not folder.exists()
    assert nj.load(tmp_path / "away").step == saved_steps(tmp_path / "away")[-1]


def test_a_read_only_disk_is_read_and_not_trained_on(trained, text, tmp_path, capsys):
    with small_disk(tmp_path / "disk") as disk:
        folder = shutil.copytree(trained, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for given in (folder, disk / "new"):
            code, out, err = command(
                capsys,
                "train",
                "transformer_nano",
                "--run",
                given,
                "--data",
                text,
                *TRANSFORMER,
                *RUN,
            )
            assert code == 2 and out == "" and err.count("\n") == 1
            assert "cannot write the run folder" in err and "Read-only file system" in err
        code, _, err = command(capsys, "eval", folder)
        assert code == 0 and err == ""


@pytest.mark.parametrize("kind", ["metrics.jsonl", "tensorboard", "loss.png"])
def test_files_of_the_wrong_kind_cost_a_warning(kind, text, tmp_path, trained, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    for step in (8, 12):
        shutil.rmtree(folder / "checkpoints" / str(step))
    path = folder / kind
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.touch() if kind == "tensorboard" else path.mkdir()
    code, out, err = command(capsys, "train", "transformer_nano", "--run", folder)
    assert code == 0 and out.splitlines()[-1].startswith("done: step=12 ")
    lines = err.splitlines()
    assert lines and all(line.startswith("nestedjax train: warning: ") for line in lines), err
    assert kind in lines[0] and len(lines) == (2 if kind == "metrics.jsonl" else 1)
    assert nj.load(folder).step == 12
