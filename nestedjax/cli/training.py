"""What `nestedjax train` does between its arguments and its last line."""

import os
from collections.abc import Sequence

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding

from nestedjax import configs, models, overrides, runs, sharding
from nestedjax.checkpoint import Checkpoints
from nestedjax.cli.printing import printable
from nestedjax.cli.progress import Progress
from nestedjax.configs import RunConfig
from nestedjax.data import SentencePieceVocabulary, Vocabulary
from nestedjax.overrides import ConfigError
from nestedjax.training import (
    Event,
    Hook,
    MetricsWriter,
    Result,
    Started,
    TrainState,
    plot_losses,
)
from nestedjax.training import train as loop

SAMPLE = 240  # tokens


def require_free(folder: str) -> None:
    """Refuse to begin a run among other files.

    Raises:
      ConfigError: the folder is a file, or holds something that is no run.
    """
    path = epath.Path(folder)
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{folder} is a file, not a run folder; give another one with --run")
    others = [p.name for p in path.iterdir() if p.name != "config.json.tmp"]
    if others:
        raise ConfigError(
            f"{folder} holds {others[0]} but no run; give an empty or new folder with --run"
        )


def new_run(
    preset: str, assignments: Sequence[str], files: Sequence[str], vocabulary: str | None
) -> RunConfig:
    """The configuration of a new run.

    Raises:
      ConfigError: an unknown preset or setting, or settings that do not fit each other.
    """
    config = configs.run_preset(preset)
    config = _with_data(config, files, vocabulary)
    found = runs.vocabulary_of(config)
    # The model of a preset is as wide at its ends as the vocabulary it is given.
    config = overrides.replace(config, "model.vocab", str(found.size))
    config = configs.change(config, assignments)
    if config.model.vocab < found.size:
        raise ConfigError(
            f"vocab={config.model.vocab} is less than the vocabulary's {found.size} tokens; "
            "leave it out, or give more"
        )
    return configs.check(config)


def continued(
    saved: RunConfig,
    preset: str,
    assignments: Sequence[str],
    files: Sequence[str],
    vocabulary: str | None,
) -> RunConfig:
    """The configuration of a run that goes on: the saved one, with what may change changed.

    Raises:
      ConfigError: something is asked for that would make it another run.
    """
    fix = "leave it out to continue this run, or give a new folder with --run"
    if preset != saved.preset:
        raise ConfigError(f"this run folder holds a {saved.preset}, not a {preset}; {fix}")
    config = configs.change(saved, assignments)
    different = configs.changed(saved, config)
    if different:
        key, (old, new) = next(iter(different.items()))
        raise ConfigError(f"{key} was {old} when this run began, and cannot become {new}; {fix}")
    if config.loop.steps < saved.loop.steps:
        raise ConfigError(
            f"steps={config.loop.steps} is less than the run's {saved.loop.steps}; steps may only "
            "grow: leave it out to continue this run"
        )
    if vocabulary is not None:
        new = SentencePieceVocabulary(vocabulary).fingerprint
        if new != runs.vocabulary_of(saved).fingerprint:
            raise ConfigError(f"this run was made with another vocabulary than {vocabulary}; {fix}")
    # The text may have moved; the loop compares it with what the run was saved with.
    return configs.check(_with_data(config, files, vocabulary))


def train(config: RunConfig, folder: str, mesh: Mesh | None = None) -> Result:
    """Train a run in its folder, from its newest checkpoint if there is one.

    Raises:
      ConfigError, DataError, CheckpointError, MeshError: what the caller can fix.
      TrainingError: a number is not finite.
    """
    model = runs.abstract_model(config)
    definition, params = models.split(model)
    tx, schedule = runs.optimizer(config)
    vocabulary = runs.vocabulary_of(config)
    dataset, valid = runs.datasets(config, vocabulary)
    batches = _batches(config, mesh)
    state = runs.place_new_state(config, tx, mesh)
    # What is there stays until the loop has found that data and checkpoint belong to it.
    runs.save_config(folder, runs.load_config(folder) or config)
    sampler = _Sampler(config, definition, vocabulary)
    progress = Progress(config, folder, sum(x.size for x in jax.tree.leaves(params)), dataset)
    path = epath.Path(folder)

    def watch(event: Event) -> None:
        if isinstance(event, Started):
            runs.save_config(folder, config)
        progress(event)

    with (
        Checkpoints(path / "checkpoints") as checkpoints,
        MetricsWriter(folder) as metrics,
        progress,
    ):
        result = loop(
            runs.language_loss(definition),
            state,
            tx=tx,
            dataset=dataset,
            config=config.loop,
            valid=valid,
            checkpoints=checkpoints,
            metrics=metrics,
            hooks=sampler.hooks(progress),
            on_event=watch,
            probe=runs.probe(definition),
            learning_rate=schedule,
            sharding=batches,
            meta=configs.to_json(config),
        )
    if result.stopped_by is None:
        print(printable(sampler.text(result.state)))
        curve = path / "loss.png"
        plot_losses(folder, curve, title=config.preset)
        print(f"\nloss curve: {curve}")
        print(f"metrics: {path / 'metrics.jsonl'}, {path / 'tensorboard'}")
        print(f"checkpoints: {path / 'checkpoints'}")
    return result


def _batches(config: RunConfig, mesh: Mesh | None) -> NamedSharding | None:
    """Where batches lie, known to divide before anything is written."""
    if mesh is None:
        return None
    batches = sharding.batch_sharding(mesh)
    rows = config.data.batch // config.loop.microbatches
    shape = rows, config.data.length
    sharding.check_fits(shape, batches, name="a microbatch", axes=("batch", "length"))
    return batches


class _Sampler:
    """Draws text from a run's weights; the text depends on the run's seed and step alone."""

    def __init__(self, config: RunConfig, definition: models.Definition, vocabulary: Vocabulary):
        self._config, self._vocabulary = config, vocabulary
        self._prompt = vocabulary.encode("\n")[-1:]
        self._draw = runs.sampler(definition, tokens=SAMPLE)

    def text(self, state: TrainState) -> str:
        """A sample of the weights of a step."""
        key = jax.random.fold_in(state.key, state.step)
        return self._vocabulary.decode(self._draw(state.params, self._prompt, key))

    def hooks(self, progress: Progress) -> list[Hook]:
        """Print a short sample now and then."""
        every, steps = self._config.sample_every, self._config.loop.steps

        def show(state: TrainState) -> None:
            if int(state.step) < steps:  # the last sample is a longer one
                progress.write(_indented(self.text(state)[: SAMPLE // 2]))

        return [] if every is None else [Hook(every, show)]


def _indented(text: str) -> str:
    return "\n".join("    | " + line for line in printable(text).strip("\n").split("\n"))


def _with_data(config: RunConfig, files: Sequence[str], vocabulary: str | None) -> RunConfig:
    """The run with other files; paths are kept whole, so that it continues from any folder."""

    def whole(path: str) -> str:
        return path if "://" in path else os.path.abspath(path)

    changes: dict = {}
    if files:
        changes["files"] = tuple(map(whole, files))
    if vocabulary is not None:
        changes["vocabulary"] = whole(vocabulary)
    data = overrides.construct(configs.DataConfig, overrides.settings(config.data) | changes)
    return overrides.construct(RunConfig, _fields(config) | {"data": data})


def _fields(config: RunConfig) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
