"""From a run's configuration to the objects that train it: model, optimizer, state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from nestedjax import levels, models
from nestedjax.errors import ConfigError, one_line
from nestedjax.optim import (
    adamw,
    at_writes,
    boxes_of,
    clip_gradients,
    menu,
    warmup_cosine,
    warmup_stable_decay,
)
from nestedjax.optim.parts import add_decay
from nestedjax.run.config import RunConfig
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


class Built(NamedTuple):
    """A model that was built once: as a definition, and as a program that draws its weights.

    Attributes:
      definition: of the model, without weights.
      shapes: of the weights, a tree of `jax.ShapeDtypeStruct`.
      draw: `draw() -> weights`, drawn from the run's seed; does not build the model again.
    """

    definition: models.Definition
    shapes: PyTree
    draw: Callable[[], PyTree]

    @property
    def model(self) -> models.Model:
        """The model with shapes in place of weights."""
        return models.merge(self.definition, self.shapes)


def build(config: RunConfig) -> Built:
    """Build the model of a run, without allocating it.

    Raises:
      ConfigError: its settings do not fit each other.
    """
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "dtype=float64 would be computed in float32: set JAX_ENABLE_X64=1, or use dtype=float32"
        )
    how, device = config.model.implementation, jax.default_backend()
    needed = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}.get(how, device)
    if device != needed:
        raise ConfigError(
            f"implementation={how} needs a {needed.upper()}, this is a {device}: use xla"
        )
    definitions = []

    def make() -> PyTree:
        model = models.create(config.model, seed=config.seed)
        if config.optimizer.name == "dgd":
            model = models.add_taps(model)
        definition, weights = models.split(model)
        definitions.append(definition)
        return weights

    try:
        # A jaxpr is all that building a model leaves to be done: the weights are drawn by it.
        program, shapes = jax.make_jaxpr(make, return_shape=True)()
    except ValueError as error:
        raise ConfigError(one_line(error)) from error

    def draw() -> PyTree:
        leaves = jax.extend.core.jaxpr_as_fun(program)()
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return Built(definitions[0], shapes, draw)


def optimizer(
    config: RunConfig, model: models.Model
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The outer optimizer of a run and its learning rate by step.

    One global norm is clipped, that of the gradients without the taps of `dgd`; then the optimizer
    steps each block of the continuum memory at its own period and everything else at every step,
    with the learning rate of the step that a write happens in. Weight decay is decoupled and pulls
    at the same weights whatever the optimizer.

    Args:
      config: the run.
      model: of the run, abstract or not.

    Raises:
      ConfigError: a period that is not a multiple of a step's tokens.
    """
    settings, schedule = config.optimizer, schedule_of(config)

    def make(period: int) -> optax.GradientTransformation:
        rate = at_writes(schedule, period)
        rule = menu.make(
            settings.name,
            rate,
            axes=models.matrix_axes(model),
            rest=adamw(rate, b1=settings.b1, b2=settings.b2, weight_decay=0.0),
            given=settings.arguments,
        )
        return optax.chain(rule, add_decay(rate, settings.weight_decay, mask=models.weight_decays))

    try:
        tx = models.optimizer(model, make, step_tokens=config.step_tokens)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    if settings.clip is not None:
        tx = optax.chain(clip_gradients(settings.clip), tx)
    return tx, schedule


def schedule_of(config: RunConfig) -> optax.Schedule:
    """The learning rate of a run by step."""
    settings = config.optimizer
    common: dict[str, Any] = {
        "steps": config.loop.steps,
        "warmup": settings.warmup,
        "final_fraction": settings.final_fraction,
    }
    if settings.schedule == "wsd":
        return warmup_stable_decay(settings.learning_rate, cooldown=settings.cooldown, **common)
    return warmup_cosine(settings.learning_rate, **common)


def nested_system(config: RunConfig) -> NestedSystem:
    """The boxes of a run's model and of its optimizer, without allocating either.

    Raises:
      ConfigError: its settings do not fit each other.
    """
    model = build(config).model
    tx, _ = optimizer(config, model)
    memories = jax.eval_shape(tx.init, models.weights(model))
    tokens = models.step_tokens_by_label(config.model, step_tokens=config.step_tokens)
    own = model.boxes()
    boxes = levels.describe(own, boxes_of(memories), step_tokens=tokens)
    return NestedSystem(boxes, frozenset(box.name for box in boxes) - {box.name for box in own})


def new_state(
    config: RunConfig, built: Built, tx: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """The state of a run before its first step, each part of it made on the device that keeps it.

    The values do not depend on the mesh. Of the models' carried states the batch
    is split; their heads only inside a dispatch.

    Args:
      config: the run.
      built: its model.
      tx: its optimizer.
      mesh: None for one device.

    Raises:
      MeshError: a weight does not divide over the mesh.
    """

    def make() -> TrainState:
        return _first_state(config, built, tx)

    if mesh is None:
        return jax.jit(make)()
    shapes = jax.eval_shape(make)
    lead: tuple[str | None, ...] = () if config.loop.microbatches == 1 else (None,)
    if not isinstance(built.model, models.InContextModel):
        lead = (*lead, "layers")

    def names(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        return PartitionSpec(*lead, "batch", *[None] * (leaf.ndim - len(lead) - 1))

    carry = jax.tree.map(names, shapes.carry)
    axes = models.logical_axes(built.shapes)
    return jax.jit(make, out_shardings=state_shardings(shapes, axes, mesh, carry=carry))()


def abstract_state(config: RunConfig) -> TrainState:
    """The state of a run as shapes on one device, to restore a checkpoint into."""
    built = build(config)
    tx, _ = optimizer(config, built.model)
    return on_one_device(jax.eval_shape(lambda: _first_state(config, built, tx)))


def on_one_device(tree: PyTree) -> PyTree:
    """A tree of shapes on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def _first_state(config: RunConfig, built: Built, tx: optax.GradientTransformation) -> TrainState:
    weights, parts = built.draw(), config.loop.microbatches
    carry = None
    if config.data.carries:
        model = models.merge(built.definition, weights)
        # Rows are whole chunks: nothing is ever pending between two steps.
        carry = levels.at_boundary(model.init_state(config.data.batch // parts))
        if parts > 1:
            carry = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (parts, *x.shape)), carry)
    return init_state(weights, tx, seed=config.seed, carry=carry)
