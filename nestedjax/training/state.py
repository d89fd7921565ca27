"""The state of a run: one pytree that holds everything its next step depends on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class TrainState(NamedTuple):
    """Everything a step reads and writes; a checkpoint holds exactly this.

    Attributes:
      step: updates done, which is also the position in the data.
      params: slow parameters.
      opt_state: the optimizer's state.
      key: random key of the run; hooks fold the step into it to draw samples.
      carry: what the loss carries from step to step (level states in mid-period, or a random key
        of its own), or None. With microbatches its leaves have a leading axis of microbatches.
    """

    step: jax.Array  # shape=(), dtype=int32
    params: PyTree
    opt_state: PyTree
    key: jax.Array  # shape=(), a typed key
    carry: PyTree = None


def init_state(
    params: PyTree, tx: optax.GradientTransformation, *, seed: int = 0, carry: PyTree = None
) -> TrainState:
    """The state before the first step.

    Args:
      params: slow parameters.
      tx: the optimizer.
      seed: of the run's random key.
      carry: see `TrainState`.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        key=jax.random.key(seed),
        carry=carry,
    )
