"""Which leaves a checkpoint holds: their names, shapes and dtypes, and what cannot be saved."""

from typing import Any

import jax
import jax.numpy as jnp

from nestedjax.fingerprints import named_leaves

PyTree = Any

UNSUPPORTED = ("uint2", "uint4")  # of tensorstore; the signed ones are supported


class CheckpointError(ValueError):
    """No checkpoint can be used, or a tree cannot be saved; the message names the fix."""


def flatten(state: PyTree) -> dict[str, Any]:
    """The leaves of a tree that can be saved, by name."""
    found: dict[str, Any] = {}
    for name, leaf in named_leaves(state):
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"leaf {name} is a {type(leaf).__name__}; checkpoints hold JAX arrays: "
                "wrap it in jnp.asarray"
            )
        if name in found:
            raise CheckpointError(f"two leaves are called {name}; rename one")
        if str(leaf.dtype) in UNSUPPORTED:
            raise CheckpointError(
                f"leaf {name} is {leaf.dtype}, which tensorstore does not store; save it as int8"
            )
        found[name] = leaf
    return found


def describe(leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
    """The dtype and the shape of a leaf, such as `float32[2,3]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def require_same(saved: dict[str, str], wanted: dict[str, Any], what: str) -> None:
    """Require that `what` has the leaves that are wanted, as `describe` says them, and no others.

    Raises:
      CheckpointError: it does not; the message names the first one.
    """
    fix = "use the configuration of this run, or start in a new run folder"
    for name, leaf in wanted.items():
        if name not in saved:
            raise CheckpointError(f"{what} has no leaf {name}; {fix}")
        if saved[name] != describe(leaf):
            raise CheckpointError(
                f"leaf {name} is {saved[name]} in {what} and {describe(leaf)} here; {fix}"
            )
    for name in saved:
        if name not in wanted:
            raise CheckpointError(f"{what} has a leaf {name} that is not wanted here; {fix}")


def stored(named: dict[str, Any]) -> dict[str, Any]:
    """Without empty leaves, which Orbax refuses; their shapes are in the record."""
    return {name: leaf for name, leaf in named.items() if leaf.size}


def empty(like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf without elements, placed as asked for."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(like.shape, like.dtype))
        zeros = jnp.zeros(data.shape, data.dtype)
        empty = jax.random.wrap_key_data(zeros, impl=jax.random.key_impl(like))  # type: ignore[arg-type]
    else:
        empty = jnp.zeros(like.shape, like.dtype)
    return empty if like.sharding is None else jax.device_put(empty, like.sharding)
