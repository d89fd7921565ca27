"""The same level for every head of a mixer, side by side."""

import jax

from nestedjax.levels.level import Level
from nestedjax.levels.run import run, run_some


def per_head(level: Level) -> Level:
    """A level of one head as a level of many: `params` and state [H, ...], tokens [T, H, ...].

    Every array of its `Carry` has the heads in front, positions and pending tokens too. The write
    at a period's end is one branch, taken for all heads together.

    Args:
      level: a level or a composition; its params are arrays [...] of one head.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import levels
      >>> total = levels.read_write(
      ...     "total", 2,
      ...     init=lambda params: params,
      ...     read=lambda params, state, x: x + state,
      ...     write=lambda params, state, x: state + x.sum(),
      ... )
      >>> heads, start = levels.per_head(total), jnp.array([0.0, 10.0])
      >>> print(levels.run(heads, start, heads.init(start), jnp.ones((3, 2)))[0])
      [[ 1. 11.]
       [ 1. 11.]
       [ 3. 13.]]
    """
    whole, switched = level.whole, level.switched

    def advance(params, state, x, reset, valid=None):
        def one(params, state, x):
            if valid is None:
                return run(level, params, state, x, reset=reset)
            return run_some(level, params, state, x, valid)

        return jax.vmap(one, in_axes=(0, 0, 1), out_axes=(1, 0))(params, state, x)

    return level._replace(
        init=jax.vmap(level.init),
        step=jax.vmap(level.step, in_axes=(0, 0, 1), out_axes=(0, 1)),
        token=None,
        ndim=None if level.ndim is None else jax.tree.map(lambda n: n + 1, level.ndim),
        whole=None if whole is None else jax.vmap(whole, in_axes=(0, 0, 1, None), out_axes=(0, 1)),
        advance=advance,
        switched=None if switched is None else lambda how: per_head(switched(how)),
    )
