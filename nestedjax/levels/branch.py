"""What is done only where a condition holds, one sequence or a batch of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from nestedjax.levels.level import PyTree


def select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the scalar condition holds, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def when(condition: jax.Array, change: Callable[[PyTree], PyTree], held: PyTree) -> PyTree:
    """`change(held)` where the scalar condition holds, else `held`; a real branch under any `vmap`.

    `vmap` of `jax.lax.cond` computes both branches for every sequence. Here the branch is taken
    when the condition holds for any sequence of the batch, and each one selects inside it.
    """

    def changed(held: PyTree) -> PyTree:
        return select(condition, change(held), held)

    return jax.lax.cond(_of_any(condition), changed, lambda held: held, held)


@custom_vmap
def _of_any(condition: jax.Array) -> jax.Array:
    """The condition; under `vmap` whether it holds for any of the batch, which is not batched."""
    return condition


@_of_any.def_vmap
def _of_any_rule(size, batched, condition):
    del size, batched  # called for a batched condition only
    return _of_any(jnp.any(condition, axis=0)), False
