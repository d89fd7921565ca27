"""The state of a run: one pytree that holds everything its next step depends on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nestedjax.sharding import like_params, replicated, shardings_of

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


def state_shardings(
    state: TrainState, axes: PyTree, mesh: Mesh, *, carry: PyTree = None
) -> TrainState:
    """Where the whole state of a run lies: weights by the rule table, the optimizer's like them.

    Args:
      state: arrays or shapes (`jax.eval_shape`).
      axes: logical names of the parameters' dimensions, such as `models.logical_axes(params)`.
      mesh: from `sharding.make_mesh`.
      carry: logical names for the carry; default every device holds the whole of it.

    Raises:
      MeshError: a weight does not divide over the mesh.
    """
    everywhere = jax.tree.map(lambda leaf: replicated(mesh), state)
    params = shardings_of(state.params, axes, mesh)
    return everywhere._replace(
        params=params,
        opt_state=like_params(state.opt_state, state.params, params, mesh),
        carry=everywhere.carry if carry is None else shardings_of(state.carry, carry, mesh),
    )
