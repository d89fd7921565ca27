"""The training loop. It takes functions, and knows no model.

Where a dispatch ends depends on the absolute step alone, never on the step at which the process was
started. So a resumed run executes the same programs on the same groups of steps, and ends with the
same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from nestedjax.checkpoint import Checkpoints
from nestedjax.data import require_fingerprint
from nestedjax.fields import Count, check_fields
from nestedjax.sharding import batch_placer, group_placer, mesh_of, on_mesh
from nestedjax.training.events import (
    Claimed,
    Event,
    Meter,
    Saved,
    Started,
    Stepped,
    Stopping,
    Validated,
)
from nestedjax.training.metrics import MetricsWriter, Record
from nestedjax.training.nonfinite import TrainingError, advice, locate_nonfinite
from nestedjax.training.state import PyTree, TrainState
from nestedjax.training.step import (
    Batch,
    LossFn,
    loss_and_gradients,
    make_dispatch,
    make_evaluate,
)
from nestedjax.training.stopping import stop_signals

Probe = Callable[[PyTree, Batch], dict[str, PyTree]]


@runtime_checkable
class Dataset(Protocol):
    """Batches by step; `nestedjax.data.TextDataset` is one."""

    fingerprint: dict[str, Any]

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step."""

    def iterate(self, start: int) -> Iterator[Batch]:
        """Batches from a step on."""


@dataclass(frozen=True)
class LoopConfig:
    """How long a run is and what happens when; all in steps, counted from the run's beginning.

    Attributes:
      steps: length of the run.
      validate_every: steps between two validation passes; one follows the last step, too.
      checkpoint_every: steps between two checkpoints; one follows the last step, too.
      steps_per_dispatch: steps sent to the device at once; fewer where a validation pass, a
        checkpoint or a hook comes before.
      microbatches: parts a batch is split into, to save memory.
    """

    steps: Count
    validate_every: Count = 100
    checkpoint_every: Count = 100
    steps_per_dispatch: Count = 1
    microbatches: Count = 1

    def __post_init__(self):
        check_fields(self)


class Hook(NamedTuple):
    """Something to do every so many steps and after the last one, such as printing a sample.

    Attributes:
      every: steps.
      call: `call(state)`; the state is donated later, so keep no reference to it.
    """

    every: int
    call: Callable[[TrainState], None]


class Result(NamedTuple):
    """How a run ended.

    Attributes:
      state: after the last step done.
      stopped_by: what asked the run to stop before its end (`SIGTERM`, `Ctrl-C`, `preemption`), or
        None if it is complete.
      record: the newest record with a validation loss, else the newest; may be empty.
    """

    state: TrainState
    stopped_by: str | None
    record: Record


def train(
    loss_fn: LossFn,
    state: TrainState,
    *,
    tx: optax.GradientTransformation,
    dataset: Dataset,
    config: LoopConfig,
    valid: Sequence[Batch] | None = None,
    checkpoints: Checkpoints | None = None,
    metrics: MetricsWriter | None = None,
    hooks: Sequence[Hook] = (),
    on_event: Callable[[Event], None] | None = None,
    probe: Probe | None = None,
    learning_rate: Callable[[jax.Array], Any] | None = None,
    sharding: NamedSharding | None = None,
    meta: dict[str, Any] | None = None,
    require: Callable[[], None] | None = None,
) -> Result:
    """Train, from the newest checkpoint if there is one.

    Args:
      loss_fn: `loss_fn(params, batch, carry) -> (loss, (metrics, carry))`, metrics a dict of
        scalars. `metrics["tokens"]`, if given, is the number of tokens the loss is the mean over.
        A carry of None asks for fresh contexts; see `stateless` for losses without any.
      state: at step 0, from `init_state`; donated.
      tx: the optimizer.
      dataset: batches of arrays [B, ...] by step (this process's share of them).
      config: lengths and intervals.
      valid: batches of the validation pass.
      checkpoints: where to continue from and save to.
      metrics: where to record; only process 0 writes.
      hooks: run after validation, in order.
      on_event: told what happens, for progress.
      probe: `probe(params, batch) -> {name: tree}`, the outputs of the model's levels in the order
        of computation. An error names the first of them that is not finite.
      learning_rate: schedule to record; `tx` applies it.
      sharding: of a batch's leading axes, from `sharding.batch_sharding(mesh)`; default one device.
        Place the state first (`state_shardings`, `sharding.place`): what is not on the mesh is
        replicated over it.
      meta: JSON object kept in every checkpoint under `run`, such as the configuration.
      require: called before anything is recorded or saved; raises if that is not allowed any more.

    Returns:
      A `Result`.

    Raises:
      TrainingError: the loss, gradient or update is not finite; says where it began. Neither the
        state nor a checkpoint has been touched by it.
      CheckpointError: no checkpoint can be used or written.
      DataError: the data is not what the run was saved with.
      ValueError: the batch does not divide into the microbatches, or the data ends too early. The
        steps before it were saved, as before any error of the data.
    """
    with mesh_of(sharding):
        state, record = on_mesh(state, sharding), {}
        if checkpoints is not None and (restored := checkpoints.restore(state)) is not None:
            require_fingerprint(restored.meta["data"], dataset.fingerprint)
            state, record = restored.state, restored.meta["record"]
        shardings = None if sharding is None else jax.tree.map(lambda x: x.sharding, state)
        evaluate, place = make_evaluate(loss_fn), batch_placer(sharding)
        run = _Run(
            config=config,
            dispatch=make_dispatch(loss_fn, tx, learning_rate=learning_rate, shardings=shardings),
            place=group_placer(config.microbatches, sharding),
            validate=None if valid is None else lambda params: evaluate(params, map(place, valid)),
            diagnose=_diagnoser(loss_fn, probe),
            dataset=dataset,
            checkpoints=checkpoints,
            metrics=metrics if jax.process_index() == 0 else None,
            hooks=tuple(hooks),
            on_event=on_event or (lambda event: None),
            meta=meta or {},
            require=require or (lambda: None),
        )
        return _loop(run, state, record)


class _Run(NamedTuple):
    """What stays the same from the first step to the last."""

    config: LoopConfig
    dispatch: Callable[..., Any]
    place: Callable[..., Batch]
    validate: Callable[[PyTree], Record] | None
    diagnose: Callable[[TrainState, Batch], tuple[str, str]]
    dataset: Dataset
    checkpoints: Checkpoints | None
    metrics: MetricsWriter | None
    hooks: tuple[Hook, ...]
    on_event: Callable[[Event], None]
    meta: dict[str, Any]
    require: Callable[[], None]

    def claim(self, step: int) -> None:
        """Write to the run for the first time: all that the caller may have to mend has passed."""
        self.require()
        if self.metrics is not None:
            self.metrics.resume(step)
        self.on_event(Claimed(step))

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.steps

    def group_end(self, step: int) -> int:
        """Where the dispatch that begins at `step` ends: a function of absolute steps alone."""
        config = self.config
        every = [config.steps_per_dispatch, config.validate_every, config.checkpoint_every]
        every += [hook.every for hook in self.hooks]
        return min(config.steps, *(step - step % n + n for n in every))

    def boundary(self, step: int) -> bool:
        """Whether anything but the next dispatch is due."""
        every = [self.config.validate_every, self.config.checkpoint_every]
        return any(self.due(step, n) for n in [*every, *(hook.every for hook in self.hooks)])


class _Sent(NamedTuple):
    """A dispatch on its way."""

    step: int  # before it
    end: int
    metrics: dict[str, jax.Array]
    healthy: jax.Array
    tokens: int


def _loop(run: _Run, state: TrainState, record: Record) -> Result:
    step, stopped = int(state.step), None
    healthy, sent, meter, dispatches = jnp.ones((), bool), None, Meter(), 0
    batches = run.dataset.iterate(step)
    with stop_signals(lambda by, now: run.on_event(Stopping(by, now))) as asked:
        run.on_event(Started(step, run.config.steps))
        while step < run.config.steps and not stopped:
            end = run.group_end(step)
            try:
                group = _take(batches, step, end)
            except Exception:
                if sent is not None:
                    _settle(run, state, sent, meter, record, "the data")
                raise
            state, healthy, out = run.dispatch(state, healthy, run.place(group))
            if dispatches == 0:
                run.claim(step)
            # The metrics of a dispatch are read while the next one runs. If the dispatch failed,
            # the next one has changed nothing either, because it was given its `healthy`.
            if sent is not None:
                _write(run, state, _read(sent, meter), meter, sent)
            sent = _Sent(step, end, out, healthy, sum(map(_tokens, group)))
            step, dispatches = end, dispatches + 1
            if run.checkpoints is not None and run.checkpoints.reached_preemption(dispatches):
                stopped = "preemption"
            stopped = asked() or stopped
            if stopped or run.boundary(step):
                record = _settle(run, state, sent, meter, record, stopped)
                sent = None
        if dispatches == 0:
            run.claim(step)
        if run.checkpoints is not None:  # inside: a signal must not cut the last save short
            run.checkpoints.wait()
    return Result(state, stopped if step < run.config.steps else None, record)


def _settle(
    run: _Run, state: TrainState, sent: _Sent, meter: Meter, record: Record, stopped: str | None
) -> Record:
    """Do what is due after a step, in an order in which a kill at any moment does no harm.

    The lines of all steps are written before the checkpoint that makes them final.
    """
    step, config = sent.end, run.config
    records = _read(sent, meter)
    meter.pause()
    if run.validate is not None and bool(sent.healthy) and run.due(step, config.validate_every):
        found = run.validate(state.params)
        records[-1] |= {f"val_{key}": value for key, value in found.items() if key != "tokens"}
    _write(run, state, records, meter, sent)
    if "val_loss" in records[-1] or "val_loss" not in record:
        record = records[-1]
    if "val_loss" in records[-1]:
        run.on_event(Validated(step, records[-1]))
    for hook in run.hooks:
        if run.due(step, hook.every):
            hook.call(state)
    run.require()
    if run.metrics is not None:
        run.metrics.flush()
    save = stopped or run.due(step, config.checkpoint_every)
    if run.checkpoints is not None and save:
        meta = {"data": run.dataset.fingerprint, "record": record, "run": run.meta}
        run.checkpoints.save(step, state, meta=meta)
        run.on_event(Saved(step))
    meter.start()
    return record


def _read(sent: _Sent, meter: Meter) -> list[Record]:
    """Wait for a dispatch and turn its metrics into one record a step."""
    metrics = {key: np.asarray(value) for key, value in sent.metrics.items()}
    meter.tick(sent.tokens * jax.process_count(), sent.end - sent.step)
    return [
        {"step": sent.step + i + 1, **{key: value[i].item() for key, value in metrics.items()}}
        for i in range(sent.end - sent.step)
    ]


def _write(run: _Run, state: TrainState, records: list[Record], meter: Meter, sent: _Sent) -> None:
    """Record the steps of a dispatch that were applied, and raise if one was not."""
    done = sent.end if bool(sent.healthy) else int(state.step)
    speed, steps = meter.tokens_per_second(), run.config.steps
    for record in records[: done - sent.step]:
        if run.metrics is not None:
            run.metrics.write(record, {} if speed is None else {"tokens_per_second": speed})
        left = meter.seconds_left(steps - record["step"])
        run.on_event(Stepped(record["step"], steps, record, speed, left))
    if done == sent.end:
        return
    if run.metrics is not None:
        run.metrics.flush()
    found, to_do = run.diagnose(state, run.place([run.dataset[done]]))
    saved = [] if run.checkpoints is None else run.checkpoints.steps()
    kept = f"the newest checkpoint is of step {saved[-1]}" if saved else "nothing is saved yet"
    failed = records[done - sent.step]
    raise TrainingError(
        f"step {done + 1}: {found} (loss {failed['loss']}, gradient norm {failed['grad_norm']}); "
        f"the update was not applied and {kept}: {to_do}"
    )


def _diagnoser(
    loss_fn: LossFn, probe: Probe | None
) -> Callable[[TrainState, Batch], tuple[str, str]]:
    """What is not finite first, and what to do about it."""
    read_first = None

    def trees(state, batches):
        nonlocal read_first
        yield "a parameter", state.params
        yield "the carried state", state.carry
        for i in range(jax.tree.leaves(batches)[0].shape[0]):
            if probe is not None:
                levels = probe(state.params, jax.tree.map(lambda x, i=i: x[i], batches))
                read_first = f"level {next(iter(levels))}"
                yield from ((f"level {name}", tree) for name, tree in levels.items())
        compute = jax.jit(loss_and_gradients, static_argnums=0)
        loss, _, carry, gradients = compute(loss_fn, state.params, batches, state.carry)
        yield "the loss", loss
        yield "the gradient", gradients
        yield "the new carried state", carry

    def diagnose(state, batches):
        found = locate_nonfinite(trees(state, jax.tree.map(lambda x: x[0], batches)))
        where = "the optimizer's update is not finite" if found is None else str(found)
        return where, advice(found, step=int(state.step), first=read_first)

    return diagnose


def _take(batches: Iterator[Batch], step: int, end: int) -> list[Batch]:
    group = []
    for number in range(step, end):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"the data ends after step {number}; give an endless order of it")
        group.append(batch)
    return group


def _tokens(batch: Batch) -> int:
    return (batch["tokens"] if "tokens" in batch else jax.tree.leaves(batch)[0]).size
