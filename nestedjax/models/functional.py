"""A model as functions of its weights, which is how everything above the models works with it.

    definition, weights = models.split(models.create("hope_nano"))
    logits, state = models.merge(definition, weights)(tokens)

These few are the only ones that know how models hold their weights: nothing above imports flax.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx

from nestedjax.models.build import Model, build

Definition = nnx.GraphDef  # a model without its weights: hashable, static under jit


def create(preset: Any, *, seed: int = 0) -> Model:
    """Build a model with weights drawn from a seed.

    Args:
      preset: a name in `PRESETS`, or a model configuration.
      seed: of its weights.

    Raises:
      ValueError: see `build`.
    """
    return build(preset, rngs=nnx.Rngs(seed))


def abstract(make: Callable[[], Model]) -> Model:
    """The model that `make` returns, with shapes in place of weights; nothing is allocated.

    Example:
      >>> from nestedjax import models
      >>> model = models.abstract(lambda: models.create("hope_1p3b"))
      >>> f"{models.parameter_count(model):,}"
      '1,323,727,904'
    """
    return nnx.eval_shape(make)


def split(model: Model) -> tuple[Definition, Any]:
    """A model's definition and its weights, a tree of arrays (of shapes, if it is abstract)."""
    return nnx.split(model)


def weights(model: Model) -> Any:
    """The weights of a model: what its gradient, its optimizer and its checkpoints are trees of."""
    return nnx.state(model, nnx.Param)


def merge(definition: Definition, weights: Any) -> Model:
    """The model of a definition with these weights."""
    return nnx.merge(definition, weights)
