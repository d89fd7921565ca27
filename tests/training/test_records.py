"""What a run leaves behind: lines and events; and the meter and the search for a nan."""

import json

import jax.numpy as jnp
import pytest

from nestedjax import training
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


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match="no metrics.jsonl.*run folder"):
        read_metrics(tmp_path)


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
