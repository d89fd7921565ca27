"""Taking a `Carry` apart: the plain states at a period's end, and the axes of a batch."""

import jax
import jax.numpy as jnp

from nestedjax.levels.level import PyTree
from nestedjax.levels.run import Carry


def at_boundary(tree: PyTree) -> PyTree:
    """Replace every `Carry` in a tree by the plain state in it, so that `run` takes its fast path.

    Args:
      tree: a tree with `Carry`s, each of which must stand on a boundary of its system's period;
        this cannot be checked where positions are traced.

    Returns:
      The tree with states as `init` returns them. How many tokens came before is forgotten.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import levels
      >>> total = levels.read_write(
      ...     "total", 2,
      ...     init=lambda params: jnp.zeros(()),
      ...     read=lambda params, state, x: x + state,
      ...     write=lambda params, state, x: state + x.sum(),
      ... )
      >>> _, carry = levels.run(total, None, total.init(None), jnp.ones(4))
      >>> print(levels.run(total, None, levels.at_boundary(carry), jnp.ones(2))[0])
      [5. 5.]
    """
    return jax.tree.map(_plain, tree, is_leaf=_is_carry)


def resumed(states: PyTree, like: PyTree) -> PyTree:
    """Undo `at_boundary`: wrap plain states in `Carry`s with nothing pending.

    Args:
      states: what `at_boundary` returned.
      like: a tree with `Carry`s of the same structure, such as the start of a context.

    Returns:
      A tree like `like`; positions count from the boundary.
    """
    return jax.tree.map(_dressed, like, states, is_leaf=_is_carry)


def batch_axes(carry: PyTree) -> PyTree:
    """`in_axes` and `out_axes` for `jax.vmap` over sequences that advance in lockstep.

    With a shared position the write at a period's end stays a real branch; with one position per
    sequence `vmap` turns it into a select, and every token pays for a write. Not for calls with
    `reset=`, after which positions differ.

    Args:
      carry: a `Carry` (batched or not) of the system.

    Returns:
      The same tree with 0 for every array and None for every position.
    """
    if isinstance(carry, Carry):
        return Carry(batch_axes(carry.state), batch_axes(carry.pending), None)  # type: ignore[arg-type]
    return jax.tree.map(
        lambda node: batch_axes(node) if isinstance(node, Carry) else 0,
        carry,
        is_leaf=lambda node: isinstance(node, Carry),
    )


def _is_carry(node):
    return isinstance(node, Carry)


def _is_composition(carry):
    parts = carry.state
    return isinstance(parts, tuple) and bool(parts) and all(map(_is_carry, parts))


def _plain(node):
    if not _is_carry(node):
        return node
    return tuple(map(_plain, node.state)) if _is_composition(node) else node.state


def _dressed(node, state):
    if not _is_carry(node):
        return state
    if _is_composition(node):
        state = tuple(map(_dressed, node.state, state))
    nothing = jax.tree.map(jnp.zeros_like, node.pending)
    return Carry(state, nothing, jnp.zeros_like(node.position))
