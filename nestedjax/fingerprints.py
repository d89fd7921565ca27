"""Fingerprints of trees: two sums a leaf, the same however the leaf is sharded."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def fingerprints(state: PyTree) -> dict[str, str]:
    """Fingerprint every leaf: equal on any mesh for equal trees, different after one flipped bit.

    Over the words w_i of a leaf (its elements as unsigned integers, 64-bit ones as two words)
    they are sum_i w_i and sum_i (i + 1) w_i, modulo 2^32. Both sums are exact and do not depend on
    the order of summation, hence not on how a leaf is sharded.

    Args:
      state: a tree of arrays of any dtype, random keys among them.

    Returns:
      Path of each leaf -> 16 hexadecimal digits.

    Example:
      >>> import jax.numpy as jnp
      >>> fingerprints({"w": jnp.array([1, 2], jnp.int32)})
      {'w': '0000000300000005'}
    """
    named = dict(named_leaves(state))
    sums = jax.device_get(_sums(list(named.values()))) if named else []
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in zip(named, sums, strict=True)}


def named_leaves(state: PyTree) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree with their paths, such as `inner.w`."""
    # A flat dict of paths is all Orbax sees: any pytree can be saved, and errors can name a leaf.
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if x.dtype == jnp.bool_ or bits < 8:
        words = x.astype(jnp.uint32)
    else:
        # 64-bit elements become two words in a last axis.
        unsigned = {8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
        words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.ones((), jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        # Modulo 2^32, as the sums are. No reshape: it would move data between devices.
        step = jnp.asarray(stride % 2**32, jnp.uint32)
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position + place * step
        stride *= words.shape[axis]
    return jnp.stack([words.sum(dtype=jnp.uint32), (words * position).sum(dtype=jnp.uint32)])
