"""The same level for every head of a mixer, side by side under one clock."""

import jax

from nestedjax.levels.level import Level


def per_head(level: Level) -> Level:
    """A level of one head as a level of many: `params` and state [H, ...], tokens [T, H, ...].

    Unlike a `jax.vmap` of `run` it leaves one position for all heads, so that the write at the end
    of a period is one branch for all of them.

    Args:
      level: a plain level, no composition; its params are arrays [...] of one head.

    Raises:
      ValueError: it is a composition; lift its parts.

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
    if level.advance is not None:
        raise ValueError(
            f"level {level.name!r} is a composition; lift its parts, then compose them"
        )
    token, whole = level.token, level.whole
    return level._replace(
        init=jax.vmap(level.init),
        step=jax.vmap(level.step, in_axes=(0, 0, 1), out_axes=(0, 1)),
        token=None if token is None else jax.vmap(token, in_axes=(0, 0, 1, 0)),
        whole=None if whole is None else jax.vmap(whole, in_axes=(0, 0, 1, None), out_axes=(0, 1)),
    )
