"""`train`: a run in its folder, from its newest checkpoint if there is one."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding

from nestedjax import models, sharding, training
from nestedjax.checkpoint import Checkpoints
from nestedjax.data import Tokenizer
from nestedjax.errors import ConfigError, RunWarning, shown
from nestedjax.run.assemble import Built, build, new_state, optimizer, schedule_of
from nestedjax.run.config import RunConfig, check
from nestedjax.run.data import Batches, OwnData, own_batches, text_of, tokenizer_of
from nestedjax.run.folder import remove_empty, save_config, saved_run
from nestedjax.run.functions import Loss, language_loss, probe
from nestedjax.run.lock import locked
from nestedjax.run.presets import run_preset
from nestedjax.run.prompt import continuation, default_prompt
from nestedjax.run.saved import to_json
from nestedjax.run.trained import Trained, cached_sampler
from nestedjax.training import Claimed, Hook, MetricsWriter, Started, TrainState

SAMPLE = 240  # tokens


class Began(NamedTuple):
    """All is made and nothing is compiled yet.

    Attributes:
      run: what is trained.
      parameters: of the model.
      tokens: of the training text; None for the caller's own data.
    """

    run: RunConfig
    parameters: int
    tokens: int | None


class Sampled(NamedTuple):
    """The weights of `step` drew `text`."""

    step: int
    text: str


Event = training.Event | Began | Sampled
Watch = Callable[[Event], None]


class Result(NamedTuple):
    """How a run ended.

    Attributes:
      trained: the model after the last step done.
      record: the metrics of the newest step with a validation loss, else of the newest.
      stopped_by: what asked the run to stop before its end (`SIGTERM`, `Ctrl-C`, `preemption`), or
        None if it is complete.
      state: everything the next step would read.
    """

    trained: Trained
    record: dict[str, Any]
    stopped_by: str | None
    state: TrainState


def train(
    run: RunConfig,
    folder: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    data: Batches | None = None,
    valid_data: Sequence[Any] | None = None,
    loss: Loss | None = None,
    on_event: Watch | None = None,
) -> Result:
    """Train a run in its folder, from its newest checkpoint if there is one.

    Started again after any interruption it ends bit for bit as if it had never stopped. Ctrl-C,
    SIGTERM and SIGHUP finish the dispatch, save, and return.

    Args:
      run: from `run_preset`. In a folder that holds a run with a saved step, only `steps` (to
        more) and when it validates, saves and samples may differ from what they were.
      folder: gets config.json, checkpoints/, metrics.jsonl and tensorboard/; locked meanwhile.
      mesh: from `nestedjax.sharding.make_mesh`; None for one device. It may differ when the run
        continues.
      data: batches by step in place of the run's files, see `Batches`; each row begins a fresh
        context, unless the run's `order` is "contiguous". `files` or `context_rows` beside it are
        refused.
      valid_data: a sequence of such batches; default those of the run's files, or none with `data`.
      loss: `loss(logits, batch) -> losses`, [B, T, V] to [B, T]: the loss of each target, weighted
        as you like; their mean over `batch["mask"]` is trained and validated.
      on_event: told what happens: `Began`, the events of `nestedjax.training`, and every
        `sample_every` steps a `Sampled` (for text, and only if this is given).

    Raises:
      ConfigError, DataError, CheckpointError, MeshError: what the caller can fix, another process
        that trains this run among it; nothing was written by then, unless the data fails later.
      SaveError: a checkpoint could not be written; those before it are whole.
      TrainingError: a number is not finite, or the run folder is gone.

    Warns:
      RunWarning: metrics cannot be written; or more steps change the learning rate of the next one.

    Example:
      >>> import tempfile
      >>> import nestedjax as nj
      >>> tiny = {"layers": 1, "width": 16, "hidden": 16, "attention.heads": 2}
      >>> run = nj.run_preset("transformer_nano", tiny, steps=2, batch=2, length=16)
      >>> result = nj.train(run, tempfile.mkdtemp() + "/tiny")
      >>> result.trained.step
      2
    """
    _require_types(run, folder, mesh, loss=loss, on_event=on_event)
    run = check(_with_given(run, data, loss))
    saved_run(folder, run)
    tokenizer = tokenizer_of(run)
    dataset, valid = _data(run, tokenizer, data, valid_data)
    built = build(run)
    tx, schedule = optimizer(run, built.model)
    batches = _batches(run, mesh)
    state = new_state(run, built, tx, mesh)
    try:
        with (
            locked(folder) as require,
            Checkpoints(epath.Path(folder) / "checkpoints") as saves,
            MetricsWriter(folder) as metrics,
            jax.numpy_dtype_promotion("standard"),  # optax promotes, whatever its caller has set
        ):
            saved = saved_run(folder, run)  # again: another process may have been here
            result = training.train(
                language_loss(built.definition, loss),
                state,
                tx=tx,
                dataset=dataset,
                config=run.loop,
                valid=valid,
                checkpoints=saves,
                metrics=metrics,
                hooks=_sampling(run, built.definition, tokenizer, on_event) if data is None else [],
                on_event=_watcher(run, saved, folder, built, dataset, on_event),
                probe=probe(built.definition),
                learning_rate=schedule,
                sharding=batches,
                meta=to_json(run),
                require=require,
            )
    finally:
        if jax.process_index() == 0:
            remove_empty(folder)
    model = models.merge(built.definition, result.state.params)
    trained = Trained(model, tokenizer, run, int(result.state.step))
    return Result(trained, result.record, result.stopped_by, result.state)


def _require_types(run: Any, folder: Any, mesh: Any, **functions: Any) -> None:
    """Refuse what is no run, folder, mesh or function, by name."""
    if not isinstance(run, RunConfig):
        raise ConfigError(f"run is {shown(run)}; make one with run_preset")
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ConfigError(f"folder is {shown(folder)}; give a path")
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ConfigError(f"mesh is {shown(mesh)}; make one with nestedjax.sharding.make_mesh")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ConfigError(f"{name} is {shown(function)}; give a function, or leave it out")


def _watcher(
    run: RunConfig,
    saved: RunConfig | None,
    folder: str | os.PathLike,
    built: Built,
    dataset: training.Dataset,
    on_event: Watch | None,
) -> Watch:
    """Save the configuration once the first step is on its way, and pass every event on."""
    tell = on_event or (lambda event: None)

    def watch(event: Event) -> None:
        if isinstance(event, Started):
            if saved is not None:
                _warn_of_rate(saved, run, event.step)
            count = sum(leaf.size for leaf in jax.tree.leaves(built.shapes))
            tell(Began(run, count, getattr(dataset, "tokens", None)))
        if isinstance(event, Claimed) and jax.process_index() == 0:
            save_config(folder, run)
        tell(event)

    return watch


def _warn_of_rate(saved: RunConfig, run: RunConfig, step: int) -> None:
    """Say it if the run grows and the learning rate jumps therefore."""
    old, new = (float(schedule_of(config)(step)) for config in (saved, run))
    if jax.process_index() == 0 and f"{old:.3g}" != f"{new:.3g}":
        warnings.warn(
            f"the learning rate of step {step + 1} is {new:.3g} and was to be {old:.3g}, because"
            f" the run grows from {saved.loop.steps} to {run.loop.steps} steps; a run of"
            " schedule=wsd grows without a jump until its cooldown begins",
            RunWarning,
            stacklevel=2,
        )


def _with_given(run: RunConfig, data: Any, loss: Any) -> RunConfig:
    """The run with a note of what is not its own.

    Raises:
      ConfigError: settings that say how text is read, with `data` in its place.
    """
    given: tuple[Any, ...] = ("data",) * (data is not None) + ("loss",) * (loss is not None)
    if data is not None:
        rows = run.data.context_rows
        if run.data.files:
            raise ConfigError(f"data and files={run.data.files[0]} are both given; leave one out")
        if rows not in (None, _usual_rows(run)):
            raise ConfigError(
                f"context_rows={rows} is a way to read text; with data each row begins a fresh"
                " context: leave it out, or carry contexts by order=contiguous"
            )
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, context_rows=None))
    return dataclasses.replace(run, given=given)


def _usual_rows(run: RunConfig) -> int | None:
    """The `context_rows` of the run's preset, which nobody asked for."""
    known = run.preset in models.PRESETS
    return run_preset(run.preset).data.context_rows if known else None


def _data(
    run: RunConfig, tokenizer: Tokenizer, data: Any, valid_data: Any
) -> tuple[training.Dataset, list[Any] | None]:
    """The batches to train on, and those of a validation pass."""
    vocab, valid = run.model.vocab, None
    if valid_data is not None:
        count = run.data.validation_batches
        valid = own_batches(valid_data, count, vocab, run.model.period)
    if data is None:
        text, held_out = text_of(run, tokenizer)
        return text, held_out if valid is None else valid
    shape = run.data.batch // jax.process_count(), run.data.length
    own = OwnData(data, vocab=vocab, shape=shape, period=run.model.period, steps=run.loop.steps)
    own[0]  # refuses batches of another form before anything is written
    return own, valid


def _batches(run: RunConfig, mesh: Mesh | None) -> NamedSharding | None:
    """Where batches lie, known to divide before anything is written."""
    if mesh is None:
        return None
    batches = sharding.batch_sharding(mesh)
    shape = run.data.batch // run.loop.microbatches, run.data.length
    sharding.check_fits(shape, batches, name="a microbatch", axes=("batch", "length"))
    return batches


def _sampling(
    run: RunConfig, definition: models.Definition, tokenizer: Tokenizer, tell: Watch | None
) -> list[Hook]:
    """Draw text now and then, if anybody watches; it depends on the run's seed and step alone."""
    if tell is None or run.sample_every is None:
        return []
    draw, prompt = cached_sampler(definition, SAMPLE), tokenizer.encode(default_prompt(tokenizer))

    def sample(state: TrainState) -> None:
        key = jax.random.fold_in(state.key, state.step)
        drawn = draw(state.params, prompt, key)
        tell(Sampled(int(state.step), continuation(tokenizer, prompt, drawn)))

    return [Hook(run.sample_every, sample)]
