"""From a run's configuration to the objects that train it: data, model, optimizer, state."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from nestedjax import configs, levels, models
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
from nestedjax.optim import adamw, boxes_of, menu, warmup_cosine
from nestedjax.optim.parts import add_decay
from nestedjax.overrides import ConfigError, one_line
from nestedjax.training import TrainState, init_state, state_shardings

PyTree = Any


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
        context_rows=data.context_rows,
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
    if isinstance(config.model, models.HopeConfig):
        how, device = config.model.implementation, jax.default_backend()
        if how == "pallas_tpu" and device != "tpu":
            raise ConfigError(f"implementation={how} needs a TPU, this is a {device}: use xla")
    try:
        model = models.create(config.model, seed=config.seed)
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    return models.add_taps(model) if config.optimizer.name == "dgd" else model


def abstract_model(config: RunConfig) -> models.Model:
    """The model of a run with shapes in place of weights."""
    return models.abstract(lambda: new_model(config))


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

        rule = menu.make(
            settings.name,
            rate,
            axes=models.matrix_axes(model),
            rest=adamw(rate, b1=settings.b1, b2=settings.b2, weight_decay=0.0),
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
    memories = jax.eval_shape(tx.init, models.weights(model))
    tokens = models.step_tokens_by_label(config.model, step_tokens=config.step_tokens)
    own = model.boxes()
    boxes = levels.describe(own, boxes_of(memories), step_tokens=tokens)
    return NestedSystem(boxes, frozenset(box.name for box in boxes) - {box.name for box in own})


def new_state(config: RunConfig, tx: optax.GradientTransformation) -> TrainState:
    """The state of a run before its first step."""
    model, parts = new_model(config), config.loop.microbatches
    carry = None
    if config.data.carries:
        # Rows are whole chunks: nothing is ever pending between two steps.
        carry = levels.at_boundary(model.init_state(config.data.batch // parts))
        if parts > 1:
            carry = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (parts, *x.shape)), carry)
    return init_state(models.weights(model), tx, seed=config.seed, carry=carry)


def abstract_state(config: RunConfig) -> TrainState:
    """The state of a run as shapes on one device, to restore a checkpoint into."""
    tx, _ = optimizer(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda: new_state(config, tx)),
    )


def place_new_state(
    config: RunConfig, tx: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState:
    """The state of a run before its first step, each part of it made on the device that keeps it.

    The values do not depend on the mesh. Of the models' carried states the batch
    is split; their heads only inside a dispatch.

    Raises:
      MeshError: a weight does not divide over the mesh.
    """

    def make() -> TrainState:
        return new_state(config, tx)

    if mesh is None:
        return jax.jit(make)()
    shapes = jax.eval_shape(make)
    lead: tuple[str | None, ...] = () if config.loop.microbatches == 1 else (None,)
    if not isinstance(abstract_model(config), models.InContextModel):
        lead = (*lead, "layers")

    def names(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        return PartitionSpec(*lead, "batch", *[None] * (leaf.ndim - len(lead) - 1))

    carry = jax.tree.map(names, shapes.carry)
    axes = models.logical_axes(shapes.params)
    return jax.jit(make, out_shardings=state_shardings(shapes, axes, mesh, carry=carry))()
