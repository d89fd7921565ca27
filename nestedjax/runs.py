"""From a run's configuration to the objects that train it, and from a run folder back to a model.

A run folder holds `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `loss.png`.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from nestedjax import configs, levels, models
from nestedjax.checkpoint import CheckpointError, Checkpoints
from nestedjax.configs import RunConfig
from nestedjax.data import (
    Batch,
    ByteVocabulary,
    SentencePieceVocabulary,
    TextDataset,
    Vocabulary,
    bundled,
    text_dataset,
)
from nestedjax.evaluation import generate
from nestedjax.optim import in_steps, in_tokens, menu
from nestedjax.optim.parts import add_decay
from nestedjax.overrides import ConfigError, one_line
from nestedjax.training import (
    LossFn,
    TrainState,
    adamw,
    init_state,
    state_shardings,
    warmup_cosine,
)

PyTree = Any


class Model(NamedTuple):
    """A trained model out of a run folder.

    Attributes:
      config: of its run.
      step: updates it has seen.
      model: with the weights of that step.
      vocabulary: its tokens.
    """

    config: RunConfig
    step: int
    model: models.Model
    vocabulary: Vocabulary


class NestedSystem(NamedTuple):
    """Everything that learns in a run.

    Attributes:
      boxes: slow to fast.
      optimizer: names of those boxes that are memories of the outer optimizer.
    """

    boxes: list[levels.Box]
    optimizer: frozenset[str]


def vocabulary_of(config: RunConfig) -> Vocabulary:
    """The vocabulary of a run: bytes, or its SentencePiece model."""
    path = config.data.vocabulary
    return ByteVocabulary() if path is None else SentencePieceVocabulary(path)


def datasets(config: RunConfig, vocabulary: Vocabulary) -> tuple[TextDataset, Sequence[Batch]]:
    """The training data, and the batches of a validation pass.

    Raises:
      DataError: a file is missing or empty, or too short for the settings.
    """
    data, files = config.data, config.data.files or bundled()
    common = {"length": data.length, "align": configs.alignment(config.model)}
    train = text_dataset(
        files,
        vocabulary,
        batch=data.batch,
        seed=config.seed,
        split="train",
        order=data.order,
        **common,
    )
    valid = text_dataset(files, vocabulary, batch=data.batch, split="valid", order="once", **common)
    count = min(len(valid), data.validation_batches or len(valid))
    return train, [valid[step] for step in range(count)]


def new_model(config: RunConfig) -> models.Model:
    """The model of a run before its first step.

    Raises:
      ConfigError: its settings do not fit each other.
    """
    try:
        model = models.build(config.model, rngs=nnx.Rngs(config.seed))
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    return models.add_taps(model) if config.optimizer.name == "dgd" else model


def abstract_model(config: RunConfig) -> models.Model:
    """The model of a run with shapes in place of weights."""
    return nnx.eval_shape(lambda: new_model(config))


def optimizer(config: RunConfig) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The outer optimizer of a run and its learning rate by step.

    One global norm is clipped; then the optimizer steps each block of the continuum memory at its
    own period and everything else at every step. Weight decay is decoupled and pulls at the same
    weights whatever the optimizer.

    Raises:
      ConfigError: a period that is not a multiple of a step's tokens.
    """
    settings, steps = config.optimizer, config.loop.steps
    schedule = warmup_cosine(
        settings.learning_rate,
        steps=steps,
        warmup=settings.warmup,
        final_fraction=settings.final_fraction,
    )

    model = abstract_model(config)

    def make(period: int) -> optax.GradientTransformation:
        def rate(writes: jax.Array) -> jax.Array:
            return schedule(writes * period)

        moments: dict[str, Any] = {
            "b1": settings.b1,
            "b2": settings.b2,
            "clip": None,
            "decay_mask": decays,
        }
        if settings.name == "adamw":
            return adamw(rate, weight_decay=settings.weight_decay, **moments)
        rule = menu.make(
            settings.name,
            rate,
            axes=models.matrix_axes(model),
            rest=adamw(rate, weight_decay=0.0, **moments),
            given=dict(settings.arguments),
        )
        return optax.chain(rule, add_decay(rate, settings.weight_decay, mask=decays))

    try:
        tx = models.optimizer(model, make, step_tokens=config.step_tokens)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    if settings.clip is not None:
        tx = optax.chain(optax.clip_by_global_norm(settings.clip), tx)
    return tx, schedule


def decays(params: PyTree) -> PyTree:
    """Whether weight decay pulls each weight to zero: projections and the embedding.

    Not norms, the convolution (the identity at the start), nor the initial states of memories.
    """

    def decay(path, _):
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return "embedding" in names or ("kernel" in names and "conv" not in names)

    return jax.tree.map_with_path(decay, params)


def nested_system(config: RunConfig) -> NestedSystem:
    """The boxes of a run's model and of its optimizer, without allocating either.

    Raises:
      ConfigError: its settings do not fit each other.
    """
    model = abstract_model(config)
    tx, _ = optimizer(config)
    params = nnx.state(model, nnx.Param)
    memories = jax.eval_shape(tx.init, params)
    steps = in_steps(models.periods(config.model), step_tokens=config.step_tokens)
    tokens = in_tokens(steps, step_tokens=config.step_tokens)
    own = list(model.boxes()) if isinstance(model, levels.HasBoxes) else []
    boxes = levels.describe(own, memories, params=params, step_tokens=tokens)
    return NestedSystem(
        boxes, frozenset(box.name for box in boxes) - {box.name for box in own} - {"parameters"}
    )


def new_state(config: RunConfig, tx: optax.GradientTransformation) -> TrainState:
    """The state of a run before its first step."""
    model, parts = new_model(config), config.loop.microbatches
    carry = None
    if config.data.order == "contiguous":
        carry = model.init_state(config.data.batch // parts)
        if parts > 1:
            carry = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (parts, *x.shape)), carry)
    return init_state(nnx.state(model, nnx.Param), tx, seed=config.seed, carry=carry)


def place_new_state(
    config: RunConfig, tx: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState:
    """The state of a run before its first step, each part of it made on the device that keeps it.

    The values do not depend on the mesh. Of the models' states in `data.order=contiguous` the batch
    is split; their heads only inside a dispatch.

    Raises:
      MeshError: a weight does not divide over the mesh.
    """

    def make() -> TrainState:
        return new_state(config, tx)

    if mesh is None:
        return jax.jit(make)()
    shapes = jax.eval_shape(make)
    lead = ("layers",) if config.loop.microbatches == 1 else (None, "layers")

    def names(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        return PartitionSpec(*lead, "batch", *[None] * (leaf.ndim - len(lead) - 1))

    carry = jax.tree.map(names, shapes.carry)
    axes = models.logical_axes(shapes.params)
    return jax.jit(make, out_shardings=state_shardings(shapes, axes, mesh, carry=carry))()


def language_loss(graphdef: nnx.GraphDef) -> LossFn:
    """Next-token cross-entropy, in nats per token, of the model that `graphdef` describes.

    Returns:
      `loss_fn(params, batch, carry) -> (loss, ({"tokens": n}, carry))`, the mean over the n tokens
      of `batch["mask"]`. A carry is the model's state after the step before; gradients end there.
    """

    def loss_fn(params, batch, carry):
        model = nnx.merge(graphdef, params)
        state = None if carry is None else jax.lax.stop_gradient(carry)
        logits, state = model(batch["tokens"], state, resets=batch["resets"])
        losses = token_losses(logits, batch["targets"])
        count = batch["mask"].sum(dtype=jnp.int32)
        weight = 1 / jnp.maximum(count, 1).astype(losses.dtype)
        loss = jnp.where(batch["mask"], losses, 0.0).sum() * weight
        return loss, ({"tokens": count}, None if carry is None else state)

    return loss_fn


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) of each token, in nats.

    Args:
      logits: [B, T, V].
      targets: int32 [B, T].
    """
    # A masked sum and not an index: it also runs over a vocabulary that a mesh has split.
    vocab = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    picked = jnp.where(vocab[None, None] == targets[..., None], logits, 0.0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def sampler(
    graphdef: nnx.GraphDef, *, tokens: int, temperature: float | int = 0.8, top_k: int | None = None
) -> Callable[[PyTree, np.ndarray, jax.Array], np.ndarray]:
    """Compile the continuation of a prompt.

    Args:
      graphdef: of a model.
      tokens: how many to draw.
      temperature: see `nestedjax.evaluation.generate`.
      top_k: see there.

    Returns:
      `draw(params, prompt, key) -> tokens`, a prompt int[T] to int32[tokens]; compiled once for
      each length of prompt.
    """

    @jax.jit
    def draw(params, prompt, key):
        model = nnx.merge(graphdef, params)
        options = {"tokens": tokens, "key": key, "temperature": temperature, "top_k": top_k}
        return generate(model, model.init_state(1), prompt[None], **options)[0][0]

    return lambda params, prompt, key: np.asarray(draw(params, jnp.asarray(prompt, jnp.int32), key))


def probe(graphdef: nnx.GraphDef) -> Callable[[PyTree, PyTree], dict[str, PyTree]]:
    """What the training loop asks where a number ceased to be finite."""

    @jax.jit
    def activations(params, batch):
        return nnx.merge(graphdef, params).probe(batch["tokens"], resets=batch["resets"])

    def in_order(params, batch):
        found = activations(params, batch)
        # A dict comes out of jit sorted by key; the model's own order is that of cause and effect.
        return {name: found[name] for name in probe_names(graphdef, params, batch)}

    return in_order


def probe_names(graphdef: nnx.GraphDef, params: PyTree, batch: PyTree) -> list[str]:
    """The names of a probe's activations in the order in which they are computed."""
    names: list[str] = []

    def record(params, batch):
        names.extend(nnx.merge(graphdef, params).probe(batch["tokens"], resets=batch["resets"]))

    jax.eval_shape(record, params, batch)
    return names


def save_config(folder: str | os.PathLike, config: RunConfig) -> None:
    """Write `config.json` in one atomic replacement; the folder is made if missing.

    Raises:
      ConfigError: the folder cannot be written.
    """
    path = epath.Path(folder) / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / "config.json.tmp"
        temporary.write_text(json.dumps(configs.to_json(config), indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write the run folder {os.fspath(folder)} ({error.strerror or error}); "
            "give another one with --run"
        ) from error


def load_config(folder: str | os.PathLike) -> RunConfig | None:
    """The configuration of a run folder, or None if there is no run in it.

    Raises:
      ConfigError: `config.json` cannot be read.
    """
    path = epath.Path(folder) / "config.json"
    try:
        if not path.exists():
            return None
        return configs.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"{path} is no run configuration ({one_line(error)}); restore it, or use a new folder"
        ) from error


def require_config(folder: str | os.PathLike) -> RunConfig:
    """The configuration of a run folder.

    Raises:
      ConfigError: there is no run in it, or `config.json` cannot be read.
    """
    config = load_config(folder)
    if config is None:
        raise ConfigError(
            f"no run in {os.fspath(folder)}; make one with nestedjax train PRESET --run DIR"
        )
    return config


def load(folder: str | os.PathLike) -> Model:
    """The newest whole model of a run folder, on one device.

    Raises:
      ConfigError: it is no run folder, or nothing is saved in it yet.
      CheckpointError: nothing in it is whole.
    """
    config = require_config(folder)
    tx, _ = optimizer(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda: new_state(config, tx)),
    )
    checkpoints = epath.Path(folder) / "checkpoints"
    restored = None
    if checkpoints.exists():
        with Checkpoints(checkpoints) as found:
            restored = found.restore(like)
    if restored is None:
        raise CheckpointError(f"no checkpoint in {os.fspath(folder)} yet; train it first")
    graphdef, _ = nnx.split(abstract_model(config))
    model = nnx.merge(graphdef, restored.state.params)
    return Model(config, restored.step, model, vocabulary_of(config))
