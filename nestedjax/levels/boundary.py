"""States on a boundary, where nothing is pending."""

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
