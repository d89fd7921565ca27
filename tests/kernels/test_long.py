"""131,072 tokens through every recurrence, forward and backward: no drift, no NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.mlp_memory import FastWeights, Rule, mlp_memory
from pallas_kernels.selective_scan import selective_scan

LENGTH, D = 131_072, 4


def tokens(rng, count):
    made = rng.normal(size=(count, LENGTH, D))
    return made / np.linalg.norm(made, axis=-1, keepdims=True)


def delta(rng):
    """A memory that keeps nearly all, with momentum."""
    gates = dict(
        decay=(0.999, 1.0), erase=(0.01, 0.1), learning_rate=(0.01, 0.1), momentum=(0.5, 0.9)
    )
    given = {name: rng.uniform(*ends, LENGTH) for name, ends in gates.items()}
    given |= zip(("x", "error", "queries"), tokens(rng, 3), strict=True)
    return given | dict(initial=rng.normal(size=(D, D)))


def deep(rng):
    """Two deep memories, of which the second is read."""
    given = dict(zip(("keys", "values", "queries"), tokens(rng, 3)[:, None], strict=True))
    given |= dict(
        learning_rate=rng.uniform(0.0, 0.02, (1, LENGTH)), decay=rng.uniform(0.999, 1, (1, LENGTH))
    )
    inner, outer = rng.normal(size=(2, 1, 2, D, D)) * 0.5
    return given | dict(initial=FastWeights(inner, outer, None, None))


def scan(rng):
    x, write, read = tokens(rng, 3)[:, None]
    step = rng.uniform(0.001, 0.1, (1, LENGTH, D))
    return dict(x=x, step=step, decay=-rng.uniform(0.01, 1.0, (D, D)), write=write, read=read)


CASES = {
    "delta_rule": (delta, functools.partial(delta_rule, chunk_size=64), "reference"),
    "mlp_memory": (deep, functools.partial(mlp_memory, rule=Rule(), chunk_size=64), "xla"),
    "selective_scan": (scan, selective_scan, "reference"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_long_text(name):
    """In float32 against float64: the recurrence where that takes seconds, not minutes."""
    make, op, oracle = CASES[name]
    given = make(np.random.default_rng(0))

    def total(given, implementation):
        out = op(**given, implementation=implementation)
        leaves = [leaf for leaf in out if leaf is not None]
        weighted = (jnp.mean(jnp.sin(leaf)) for leaf in jax.tree.leaves(leaves))
        return sum(weighted), leaves

    def found(dtype, implementation):
        arrays = jax.tree.map(lambda a: jnp.asarray(a, dtype), given)
        both = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
        return jax.tree.map(np.asarray, both(arrays, implementation))

    with jax.enable_x64(True):
        expected = found(jnp.float64, oracle)
    for a, b in zip(
        jax.tree.leaves(found(jnp.float32, "xla")), jax.tree.leaves(expected), strict=True
    ):
        assert np.all(np.isfinite(a)) and np.max(np.abs(b)) > 0
        np.testing.assert_allclose(a, b, atol=1e-4 * np.max(np.abs(b)), rtol=0)
