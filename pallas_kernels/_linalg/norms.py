"""Norms whose squares neither overflow nor underflow, with a derivative at zero."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unit(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """`x / |x|` with the Euclidean norm over some axes; 0, with derivative 0, at x = 0.

    The largest entry is scaled to about 1 before anything is squared, so that the result does not
    depend on the scale of x over the whole range of its dtype. With an entry that is not finite the
    result is not finite either.

    Args:
      x: an array of any shape.
      axis: axes that the norm is taken over; None: all.

    Example:
      >>> import jax.numpy as jnp
      >>> [unit(scale * jnp.array([3.0, 4.0])).round(3).tolist() for scale in (1e-30, 1e30)]
      [[0.6000000238418579, 0.800000011920929], [0.6000000238418579, 0.800000011920929]]
    """
    scaled, _ = _scaled(x, axis)
    return scaled / _root(scaled, axis)


def norm(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The Euclidean norm over some axes, which stay with size 1; derivative 0 at x = 0.

    Args:
      x: an array of any shape.
      axis: axes that it is taken over; None: all.
    """
    scaled, size = _scaled(x, axis)
    return jnp.where(size == 0, size, size * _root(scaled, axis))


def _scaled(x: Array, axis: int | tuple[int, ...] | None) -> tuple[Array, Array]:
    """x with a largest entry of about 1, and what it was divided by: 0 where all of x is 0."""
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axis, keepdims=True, initial=0.0)
    # What is smaller than the smallest normal number is zero on some devices and not on others; so
    # is the reciprocal of the largest numbers, by which XLA multiplies in place of a division.
    tiny = jnp.finfo(x.dtype).tiny
    nothing, size = size < tiny, jnp.where(size > 0.25 / tiny, 0.25 / tiny, size)
    scaled = x / jnp.where(nothing, jnp.ones_like(size), size)
    zero = jnp.zeros_like(size)
    return jnp.where(nothing, jnp.zeros_like(x), scaled), jnp.where(nothing, zero, size)


def _root(scaled: Array, axis: int | tuple[int, ...] | None) -> Array:
    square = jnp.sum(scaled * scaled, axis=axis, keepdims=True)
    return jnp.sqrt(jnp.where(square == 0, jnp.ones_like(square), square))
