"""Running a level over a batch of sequences that share its slow parameters."""

from collections.abc import Sequence

import jax
import numpy as np

from nestedjax.levels.incremental import Unfinished
from nestedjax.levels.level import Level, PyTree
from nestedjax.levels.run import Carry, flags, misplaced, run


def run_batch(
    system: Level,
    params: PyTree,
    state: PyTree | None,
    x: PyTree,
    *,
    reset: jax.Array | np.ndarray | Sequence[Sequence[bool]] | None = None,
    in_turn: bool | None = None,
) -> tuple[PyTree, Carry]:
    """`run` for a batch of sequences, each with a state of its own.

    A write at a period's end is a real branch in a batch, too: one token of each sequence costs
    O(1) where the level, or every level of a composition, reads a token in O(1), and a write only
    when a period ends in any of the sequences.

    Args:
      system: a level or a composition of levels.
      params: its slow parameters, shared by the batch.
      state: None for a fresh context; else what `init` returned, or a `Carry`, with a leading batch
        axis at every array.
      x: arrays [B, T, ...].
      reset: bool[B, T]; see `run`.
      in_turn: one sequence after the other (`jax.lax.map`) in place of all side by side
        (`jax.vmap`): less at once, so that more of it stays in a CPU's caches. None chooses by
        `takes_turns`. Where a mesh is set, only inside `jax.shard_map`.

    Returns:
      y [B, T, ...] and the `Carry` for the tokens that follow, batched.

    Raises:
      ValueError: as `run`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import levels
      >>> total = levels.read_write(
      ...     "total", 2,
      ...     init=lambda params: jnp.zeros(()),
      ...     read=lambda params, state, x: x + state,
      ...     write=lambda params, state, x: state + x.sum(),
      ... )
      >>> y, carry = levels.run_batch(total, None, None, jnp.asarray([[1.0] * 3, [2.0] * 3]))
      >>> print(y, carry.position)
      [[1. 1. 3.]
       [2. 2. 6.]] [3 3]
    """

    def one(held):
        state, x, reset = held
        return run(system, params, system.init(params) if state is None else state, x, reset=reset)

    if reset is not None:  # inside of `vmap` no flag is known any more
        reset = flags(reset)
        position = state.position if isinstance(state, Carry) else 0
        misplaced(f"level {system.name!r}", system.period, first_of_each(position), reset)
    held = (state, x, reset)
    in_turn = takes_turns(x) if in_turn is None else in_turn
    if in_turn and not _on_a_mesh():
        return jax.lax.map(one, held)
    return jax.vmap(one)(held)


def first_of_each(position: jax.Array | int) -> jax.Array | int:
    """The position [B] of each sequence from [B, ...], where all of its memories stand alike."""
    if isinstance(position, int) or position.ndim < 2:
        return position
    return position.reshape(len(position), -1)[:, 0]


def position_of(state: PyTree) -> jax.Array | int:
    """Where the sequences of a batch stand, from any tree with `Carry`s in it; 0 without one.

    Args:
      state: arrays [layers, B, ...], such as a model's state.

    Returns:
      Tokens since the context's start, [B].
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Carry))
    found = [leaf.position[0] for leaf in leaves if isinstance(leaf, Carry)]
    return first_of_each(found[0]) if found else 0


def takes_turns(x: PyTree) -> bool:
    """Whether a device reads its sequences one after the other: by measurement, only a CPU does.

    A model that trains on a CPU is 8% faster so. On a mesh it needs `jax.shard_map` around it, in
    which the batch is one device's share: a loop over sequences that lie on several devices would
    leave all but one of them idle, so `run_batch` does not take turns there.

    Args:
      x: arrays [B, T, ...].
    """
    batch, length = jax.tree.leaves(x)[0].shape[:2]
    return jax.default_backend() == "cpu" and batch > 1 and length > 1


def carry_axes(carry: PyTree, *, state: PyTree, tokens: PyTree, sequence: PyTree) -> PyTree:
    """A tree like `carry` that says how each part of it is laid out, such as for `jax.shard_map`.

    Args:
      carry: a `Carry` of the system, or its shapes.
      state: what stands for states, and for the notes of an `incremental` level.
      tokens: what stands for pending tokens.
      sequence: what stands for numbers that each sequence has once.
    """

    def one(node):
        if not isinstance(node, Carry):
            return state
        pending = None if node.pending is None else tokens
        if isinstance(node.pending, Unfinished):
            pending = Unfinished(tokens, state, sequence)
        parts = node.state
        if isinstance(parts, tuple) and parts and all(isinstance(part, Carry) for part in parts):
            return Carry(tuple(map(one, parts)), pending, sequence)
        return Carry(state, pending, sequence)

    return one(carry)


def _on_a_mesh() -> bool:
    """Whether arrays may lie on several devices here; inside `jax.shard_map` they do not."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and jax.sharding.AxisType.Manual not in mesh.axis_types
