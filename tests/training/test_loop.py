"""The loop: resume to the last bit, groups of steps, the guard, signals, what is recorded."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nestedjax import training
from nestedjax.checkpoint import Checkpoints
from nestedjax.data import DataError
from nestedjax.training import (
    Claimed,
    Hook,
    MetricsWriter,
    Saved,
    Started,
    Stepped,
    TrainingError,
    Validated,
    loop,
    read_metrics,
)
from nestedjax.training.stopping import stop_signals
from tests.training import toy

# Intervals that do not divide each other, so that groups of 3 are cut in every way.
CONFIG = {"validate_every": 7, "checkpoint_every": 5, "steps_per_dispatch": 3, "microbatches": 2}
STEPS = 20


class Killed(BaseException):
    """What kill -9 does, as far as Python can see: nothing after it runs."""


def whole_run(folder, *, stop_at=None, data=None, **options):
    """A run with everything on, and its state; `stop_at`: killed when told of that step."""
    seen = []

    def on_event(event):
        seen.append(event)
        if stop_at is not None and isinstance(event, Stepped) and event.step == stop_at:
            raise Killed

    metrics = MetricsWriter(folder, tensorboard=False)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        result = toy.run(
            toy.make_state(microbatches=2),
            steps=STEPS,
            data=data,
            config=CONFIG,
            valid=[toy.ToyData()[1000], toy.ToyData()[1001]],
            checkpoints=checkpoints,
            metrics=metrics,
            hooks=[Hook(4, lambda state: None)],
            on_event=on_event,
            learning_rate=toy.SCHEDULE,
            probe=toy.probe,
            **options,
        )
        # The state is donated by later runs of the same process only.
        return result, seen, checkpoints.steps()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result, seen, steps = whole_run(folder)
    return result, (folder / "metrics.jsonl").read_bytes(), seen, steps


def test_a_whole_run_records_every_step_once(uninterrupted):
    result, lines, seen, steps = uninterrupted
    assert int(result.state.step) == STEPS and result.stopped_by is None
    assert lines.count(b"\n") == STEPS
    assert [e.step for e in seen if isinstance(e, Stepped)] == list(range(1, STEPS + 1))
    assert [e.step for e in seen if isinstance(e, Validated)] == [7, 14, 20]
    assert [e.step for e in seen if isinstance(e, Saved)] == [5, 10, 15, 20]
    assert steps == [10, 15, 20]  # keep=3
    assert seen[0] == Started(0, STEPS)
    assert result.record["step"] == 20 and "val_loss" in result.record


@pytest.mark.parametrize("kills", [[2], [6, 9], [13, 14, 19]])
def test_killed_and_resumed_is_the_same_run_to_the_last_bit(uninterrupted, tmp_path, kills):
    """Kills before the first checkpoint, between two, and in the middle of a dispatch."""
    expected, lines, _, _ = uninterrupted
    for kill in kills:
        with pytest.raises(Killed):
            whole_run(tmp_path, stop_at=kill)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 99, "lo')  # a kill in the middle of a write
    result, seen, _ = whole_run(tmp_path)
    assert seen[0] == Started(max(0, (kills[-1] - 1) // 5 * 5), STEPS)
    toy.assert_same_bits(result.state, expected.state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    assert result.record == expected.record
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, STEPS + 1))


def test_a_finished_run_is_left_as_it_is(uninterrupted, tmp_path):
    expected, lines, _, _ = uninterrupted
    whole_run(tmp_path)
    result, seen, _ = whole_run(tmp_path)
    assert seen == [Started(STEPS, STEPS), Claimed(STEPS)]
    toy.assert_same_bits(result.state, expected.state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    assert result.record == expected.record


def groups_of(monkeypatch, **options):
    """(first step, number of steps) of every dispatch of a run without a compiler."""
    found = []

    def make_dispatch(*args, **kwargs):
        def dispatch(state, healthy, batches):
            count = len(batches["targets"])
            found.append((int(state.step), count))
            return (
                state._replace(step=state.step + count),
                healthy,
                {"loss": jnp.zeros(count), "grad_norm": jnp.zeros(count)},
            )

        return dispatch

    monkeypatch.setattr(loop, "make_dispatch", make_dispatch)
    start = options.pop("start", 0)
    state = toy.make_state()._replace(step=jnp.asarray(start, jnp.int32))
    toy.run(state, **options)
    return found


def test_dispatches_end_where_the_absolute_step_says(monkeypatch):
    config = {"validate_every": 7, "checkpoint_every": 5, "steps_per_dispatch": 4}
    options = {"steps": 23, "config": config, "hooks": [Hook(6, lambda state: None)]}
    whole = groups_of(monkeypatch, **options)
    ends = {first + count for first, count in whole}
    due = {s for n in (4, 5, 6, 7) for s in range(n, 23, n)} | {23}
    assert ends == due and sum(count for _, count in whole) == 23
    for start in range(23):
        resumed = groups_of(monkeypatch, start=start, **options)
        # From the first due step on, a resumed run dispatches the very same groups.
        caught_up = [group for group in whole if group[0] >= resumed[0][0] + resumed[0][1]]
        assert resumed[1:] == caught_up
        assert resumed[0][0] + resumed[0][1] in due


def test_several_steps_a_dispatch_are_one_step_a_dispatch():
    one = toy.run(toy.make_state(), steps=8)
    four = toy.run(toy.make_state(), steps=8, config={"steps_per_dispatch": 4})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(np.float64), b.astype(np.float64), rtol=1e-6, atol=1e-7
        ),
        toy.words(one.state),
        toy.words(four.state),
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_stops_the_run_and_touches_nothing(
    uninterrupted, tmp_path, value
):
    expected, lines, _, _ = uninterrupted
    step = 12  # in the middle of a dispatch of the steps 13, 14
    with pytest.raises(TrainingError) as error:
        whole_run(tmp_path, data=toy.ToyData(bad={step: value}))
    message = str(error.value)
    assert message.startswith("step 13: ") and "\n" not in message
    assert "checkpoint is of step 10" in message and "not applied" in message
    if np.isnan(value):
        assert "level inner[" in message and "is nan" in message
        assert "look at this batch" in message and "learning_rate" not in message
    else:  # tanh of inf is 1: the loss is finite, the gradient is not
        assert "the gradient at inner" in message
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines.splitlines(True)[:step])
    # With sound data the run goes on as if nothing had happened.
    result, _, _ = whole_run(tmp_path)
    toy.assert_same_bits(result.state, expected.state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_as_it_was(uninterrupted, tmp_path, number):
    expected, lines, _, _ = uninterrupted
    before = signal.getsignal(number)

    def ask(state):
        if int(state.step) == 8:
            os.kill(os.getpid(), number)

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        metrics = MetricsWriter(tmp_path, tensorboard=False)
        options = dict(
            steps=STEPS,
            config=CONFIG,
            valid=[toy.ToyData()[1000], toy.ToyData()[1001]],
            checkpoints=checkpoints,
            metrics=metrics,
            hooks=[Hook(4, ask)],
            learning_rate=toy.SCHEDULE,
        )
        result = toy.run(toy.make_state(microbatches=2), **options)
        assert result.stopped_by == {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
        stopped_at = int(result.state.step)
        assert 8 < stopped_at < STEPS and checkpoints.steps()[-1] == stopped_at
    assert signal.getsignal(number) is before
    result, seen, _ = whole_run(tmp_path)
    assert seen[0] == Started(stopped_at, STEPS)
    toy.assert_same_bits(result.state, expected.state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines


def test_a_second_ctrl_c_interrupts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_signals() as asked:
        assert asked() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == "Ctrl-C"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_data_is_refused(tmp_path):
    with pytest.raises(Killed):
        whole_run(tmp_path, stop_at=6)
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(DataError, match="name was toy, is other"):
        whole_run(tmp_path, data=toy.ToyData(name="other"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="checkpoint_every=0 must be at least 1"):
        training.LoopConfig(steps=3, checkpoint_every=0)
    with pytest.raises(ValueError, match="batch of 4 rows does not divide into microbatches=3"):
        toy.run(toy.make_state(), config={"microbatches": 3})

    class Short(toy.ToyData):
        def iterate(self, start):
            return iter([self[step] for step in range(start, 2)])

    with pytest.raises(ValueError, match="data ends after step 2"):
        toy.run(toy.make_state(), data=Short(), config={"steps_per_dispatch": 4})


def test_a_run_over_a_mesh_gives_the_losses_of_one_device(tmp_path):
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=devices)
    losses = []
    for name, sharding in (("one", None), ("four", NamedSharding(mesh, PartitionSpec("data")))):

        def loss_fn(params, batch, carry):
            error = toy.forward(params, batch["tokens"]) - batch["targets"]
            return jnp.mean(error**2), ({}, carry)

        metrics = MetricsWriter(tmp_path / name, tensorboard=False)
        params = jax.tree.map(lambda a: a.astype(jnp.float32), toy.make_state().params)
        state = training.init_state(params, toy.TX)
        toy.run(state, steps=6, loss_fn=loss_fn, sharding=sharding, metrics=metrics)
        metrics.close()
        losses.append([record["loss"] for record in read_metrics(tmp_path / name)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
