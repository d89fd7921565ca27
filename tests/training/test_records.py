"""What a run leaves behind: lines and events; and the meter and the search for a nan."""

import json
import math

import jax.numpy as jnp
import pytest

from nestedjax import training
from nestedjax.errors import ConfigError, RunWarning
from nestedjax.training import MetricsWriter, read_metrics
from nestedjax.training.events import Meter


def record(step):
    return {"step": step, "loss": 1.0 / step}


def test_resume_drops_what_lies_behind_the_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 8):
            writer.write(record(step), {})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "los')
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, 8))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.resume(5)
        for step in (6, 7, 8):
            writer.write(record(step), {})
    records = read_metrics(tmp_path)
    assert records == [record(step) for step in range(1, 9)]
    assert not list(tmp_path.glob("*.tmp"))


def test_nothing_is_written_before_flush(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(record(1), {"tokens_per_second": 3.0})
    assert not writer.path.exists()
    writer.flush()
    assert json.loads(writer.path.read_text()) == record(1)  # no timing in it
    writer.flush()
    assert len(read_metrics(tmp_path)) == 1


def test_tensorboard_events_are_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.resume(0)
    writer.write(record(1), {"tokens_per_second": 3.0})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"tokens_per_second" in events.read_bytes() and b"loss" in events.read_bytes()


def test_a_run_that_continues_at_once_keeps_the_events_before(tmp_path):
    for step in (0, 1):
        writer = MetricsWriter(tmp_path)
        writer.resume(step)
        writer.write(record(step + 1), {})
        writer.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no metrics.jsonl.*run folder"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match="cannot read .*metrics.jsonl .Is a directory"):
        read_metrics(tmp_path)


def test_numbers_that_are_not_finite_are_json_and_come_back(tmp_path):
    given = {"step": 1, "loss": math.nan, "high": math.inf, "low": -math.inf, "one": 1.0}
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(given, {})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": "NaN", "high": "Infinity", "low": "-Infinity", "one": 1.0}
    (found,) = read_metrics(tmp_path)
    assert math.isnan(found.pop("loss")) and found == {
        k: v for k, v in given.items() if k != "loss"
    }


DAMAGE = [b"null", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"step": "1"}', b'{"loss": 1}', b"{", b""]


@pytest.mark.parametrize("damage", DAMAGE, ids=[damage[:9] for damage in DAMAGE])
def test_damaged_lines_are_told_of_and_left_out(damage, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record(step)).encode() for step in (1, 2, 3)]
    path.write_bytes(b"\n".join([lines[0], damage, *lines[1:], b'{"step": 4, "lo']))
    whole = path.read_bytes()
    with pytest.warns(RunWarning, match="metrics.jsonl: line 2 is no record and left out"):
        assert read_metrics(tmp_path) == [record(1), record(2), record(3)]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.warns(RunWarning, match="line 2 is no record.*was kept as metrics-damaged-"):
            writer.resume(2)
        writer.write(record(3), {})
    assert read_metrics(tmp_path) == [record(1), record(2), record(3)]
    (aside,) = tmp_path.glob("metrics-damaged-*.jsonl")
    assert aside.read_bytes() == whole


@pytest.mark.parametrize("kind", ["metrics.jsonl", "tensorboard"])
def test_files_of_the_wrong_kind_cost_a_warning(kind, tmp_path):
    path = tmp_path / kind
    path.touch() if kind == "tensorboard" else path.mkdir()
    writer = MetricsWriter(tmp_path)
    with pytest.warns(RunWarning, match=f"cannot write .*{kind} ") as caught:
        writer.resume(0)
        for step in (1, 2, 3):
            writer.write(record(step), {})
            writer.flush()
        writer.close()
    assert len(caught) == 1
    if kind == "tensorboard":
        assert len(read_metrics(tmp_path)) == 3


def test_lines_wait_for_room(tmp_path, monkeypatch):
    """A full disk takes half of a line: it is taken back, and all lines are written later."""
    import os

    from nestedjax.training import metrics

    def full(file):
        raise OSError(28, "No space left on device")

    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(record(1), {})
    writer.flush()
    with monkeypatch.context() as patch, pytest.warns(RunWarning, match="from step 2 on .No space"):
        patch.setattr(metrics.os, "fsync", full)
        for step in (2, 3):
            writer.write(record(step), {})
            writer.flush()
            assert read_metrics(tmp_path) == [record(1)]
    assert os.fsync is not full
    writer.write(record(4), {})
    writer.close()
    assert read_metrics(tmp_path) == [record(step) for step in (1, 2, 3, 4)]


def test_the_meter_measures_training_alone():
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    assert meter.tokens_per_second() is None and meter.seconds_left(10) is None
    meter.tick(100, 2)  # compilation: not counted
    for _ in range(3):
        now[0] += 4.0
        meter.tick(100, 2)
    assert meter.tokens_per_second() == pytest.approx(25.0)
    assert meter.seconds_left(10) == pytest.approx(20.0)
    meter.pause()
    now[0] += 1e6  # a validation
    meter.start()
    now[0] += 4.0
    meter.tick(100, 2)
    assert meter.tokens_per_second() == pytest.approx(25.0)


def test_the_first_bad_level_is_named_whatever_its_dtype():
    good = {"counts": jnp.zeros(2, jnp.int32), "w": jnp.ones(2)}
    bad = {"a": jnp.ones(2), "b": jnp.array([[1.0, 2.0], [jnp.nan, 1.0]], jnp.bfloat16)}

    def levels():
        yield "fast", good
        yield "slow", bad
        raise AssertionError("read further than needed")

    assert str(training.locate_nonfinite(levels())) == "slow at b[1, 0] is nan"
    assert training.locate_nonfinite([("fast", good)]) is None
