"""Which weights of a model learn at which period, and the outer optimizer that does it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx

from nestedjax.layers import per_weight
from nestedjax.models.config import ModelConfig
from nestedjax.optim import by_period, in_steps, nested_by_period

PyTree = Any


def block_labels(params: PyTree) -> PyTree:
    """A tree like `params` with the label of each weight's block, "" outside of continuum blocks.

    A block's label covers its MLP in all layers; the norms in front of it are stepped with the
    rest.
    """
    return per_weight(lambda weight: weight.get_metadata("group"), params)


def periods(config: ModelConfig) -> dict[str, int | None]:
    """Label -> tokens of the training stream between two writes, None for every step.

    Args:
      config: a model configuration, with or without a continuum memory.

    Returns:
      "" for everything that is stepped at every step; "cms.0" (the fastest), "cms.1", ... for the
      blocks of a continuum memory of lifetime "stream" that have a period.

    Example:
      >>> from nestedjax import models
      >>> models.periods(models.PRESETS["transformer_nano"])
      {'': None}
    """
    cms = config.continuum
    return (
        {"": None} if cms is None or cms.lifetime != "stream" else {"": None, **cms.block_periods}
    )


def labels(params: PyTree, config: ModelConfig) -> PyTree:
    """The label of every weight, as `periods` names them: a tree like `params`.

    Args:
      params: `nnx.state(model, nnx.Param)`, or any tree with the same paths.
      config: the model's configuration.
    """
    known = periods(config)
    return jax.tree.map(lambda label: label if label in known else "", block_labels(params))


def optimizer(
    model: Any,
    make: Callable[[int], optax.GradientTransformation],
    *,
    step_tokens: int,
) -> optax.GradientTransformationExtraArgs:
    """The outer optimizer of a model: each block of its continuum memory at its own period.

    With form "nested" it is `optim.nested_by_period`, else `optim.by_period`.

    Args:
      model: a model of this package, abstract or not.
      make: `make(period) -> optimizer` for what is written every `period` steps. Schedules inside
        it count writes: use `optim.at_writes(schedule, period)`.
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
      >>> tokens = models.SIZES["nano"].step_tokens
      >>> tx = models.optimizer(model, lambda period: optax.adamw(1e-3), step_tokens=tokens)
    """
    config = model.config
    _require_multiples(config, step_tokens)
    steps = in_steps(periods(config), step_tokens=step_tokens)
    groups = {label: (every, make(every or 1)) for label, every in steps.items()}
    names = labels(nnx.state(model, nnx.Param), config)
    chain = tuple(label for label in groups if label)
    if len(chain) > 1 and config.continuum.form == "nested":
        return nested_by_period(groups, names, chain=chain, rule=config.continuum.start)
    return by_period(groups, names)


def _require_multiples(config: ModelConfig, step_tokens: int) -> None:
    """Refuse periods that steps do not make up, with periods near to them that they do."""
    timed = [period for period in periods(config).values() if period is not None]
    cms = config.continuum
    if cms is None or all(period % step_tokens == 0 for period in timed):
        return
    name = next(f.name for f in dataclasses.fields(config) if getattr(config, f.name) is cms)
    fitting, before = [], step_tokens
    for period in cms.periods:
        before = before if period is None else -(-period // before) * before
        fitting.append("none" if period is None else str(before))
    raise ValueError(
        f"{name}.periods={cms.periods} are tokens, not all multiples of the {step_tokens} tokens in"
        f" one step (batch x length); set {name}.periods to {' '.join(fitting)}, or change batch or"
        " length"
    )


def step_tokens_by_label(config: ModelConfig, *, step_tokens: int) -> Mapping[str, int]:
    """Tokens between two writes of each label, as `levels.describe(..., step_tokens=)` takes them.

    Args:
      config: a model configuration.
      step_tokens: tokens in one optimizer step, batch x length.
    """
    return {label: period or step_tokens for label, period in periods(config).items()}
