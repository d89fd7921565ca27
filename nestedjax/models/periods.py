"""Which weights of a model learn at which period, and the optimizer that does it."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from nestedjax.optim import by_period, in_steps

PyTree = Any


def periods(config: Any) -> dict[str, int | None]:
    """Label -> tokens of the training stream between two writes, None for every step.

    Args:
      config: a model configuration, with or without a continuum memory `cms`.

    Returns:
      "" for everything that is stepped at every step, "cms.0" (the fastest), "cms.1", ... for the
      blocks of the continuum memory that have a period.

    Example:
      >>> from nestedjax import models
      >>> models.periods(models.CMSConfig(periods=(1024, 4096, None), hidden=8))
      {'': None, 'cms.0': 1024, 'cms.1': 4096}
    """
    cms = getattr(config, "cms", config if hasattr(config, "periods") else None)
    timed = {} if cms is None else {f"cms.{i}": p for i, p in enumerate(cms.periods) if p}
    return {"": None, **timed}


def labels(params: PyTree, config: Any) -> PyTree:
    """The label of every weight, as `periods` names them: a tree like `params`.

    A block's label covers its MLP in all layers; the norms in front of it are stepped with the
    rest.

    Args:
      params: `nnx.state(model, nnx.Param)`, or any tree with the same paths.
      config: the model's configuration.
    """
    known = periods(config)

    def label(path, _):
        names = [str(getattr(key, "key", getattr(key, "name", None))) for key in path]
        for at, name in enumerate(names[:-2]):
            if name == "cms" and names[at + 1] == "levels":
                found = f"cms.{names[at + 2]}"
                return found if found in known else ""
        return ""

    return jax.tree.map_with_path(label, params)


def optimizer(
    model: Any,
    make: Callable[[int], optax.GradientTransformation],
    *,
    step_tokens: int,
) -> optax.GradientTransformationExtraArgs:
    """The outer optimizer of a model: each block of its continuum memory at its own period.

    Args:
      model: a model of this package, abstract or not.
      make: `make(period) -> optimizer` for what is written every `period` steps. Schedules inside
        it count writes: use `lambda n: schedule(n * period)`.
      step_tokens: tokens in one optimizer step, batch x length.

    Returns:
      A transformation over `nnx.state(model, nnx.Param)`.

    Raises:
      ValueError: if a period of the model is not a multiple of `step_tokens`.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> from nestedjax import models
      >>> model = nnx.eval_shape(lambda: models.build("hope_nano", rngs=nnx.Rngs(0)))
      >>> tx = models.optimizer(model, lambda period: optax.adamw(1e-3), step_tokens=4096)
    """
    steps = in_steps(periods(model.config), step_tokens=step_tokens)
    groups = {label: (every, make(every or 1)) for label, every in steps.items()}
    return by_period(groups, labels(nnx.state(model, nnx.Param), model.config))
