"""A scan over chunks in place, against `jax.lax.scan` over chunks that were cut beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels._linalg.chunk_scan import chunk_scan

BATCH, CHUNKS, SIZE, D = 2, 3, 4, 5


def chunk(state, tokens):
    """Nonlinear in everything; one output is a tree of two arrays, one has no features."""
    mixed = jnp.sin(tokens["x"] * state["w"][:, None] + tokens["gate"][..., None])
    state = {"w": 0.5 * state["w"] + mixed.sum(1)}
    return state, {"y": mixed * state["w"][:, None], "size": jnp.sum(mixed**2, -1)}


def draw():
    rng = np.random.default_rng(0)
    shape = (BATCH, CHUNKS * SIZE)
    tokens = {"x": jnp.asarray(rng.normal(size=(*shape, D))), "unused": None}
    tokens["gate"] = jnp.asarray(rng.normal(size=shape))
    return {"w": jnp.asarray(rng.normal(size=(BATCH, D)))}, tokens


def in_place(state, tokens):
    return chunk_scan(chunk, SIZE, 1, state, tokens)


def cut(state, tokens):
    first = lambda a: jnp.moveaxis(a.reshape(BATCH, CHUNKS, SIZE, *a.shape[2:]), 1, 0)  # noqa: E731
    state, out = jax.lax.scan(chunk, state, jax.tree.map(first, tokens))
    last = lambda a: jnp.moveaxis(a, 0, 1).reshape(BATCH, CHUNKS * SIZE, *a.shape[3:])  # noqa: E731
    return state, jax.tree.map(last, out)


def total(form, given):
    return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(form(*given)))


def close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_values_and_gradients(x64):
    given = draw()
    close(jax.jit(in_place)(*given), jax.jit(cut)(*given))
    close(*(jax.jit(jax.grad(lambda g, f=f: total(f, g)))(given) for f in (in_place, cut)))


def test_second_derivatives(x64):
    given = draw()

    def squared(form):
        gradient = jax.grad(lambda g: total(form, g))
        return jax.jit(jax.grad(lambda g: sum(jnp.sum(a**2) for a in jax.tree.leaves(gradient(g)))))

    close(squared(in_place)(given), squared(cut)(given))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_batch_on_two_devices(x64, kind):
    given = draw()
    expected = jax.jit(jax.value_and_grad(lambda g: total(in_place, g)))(given)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = jax.device_put(given, jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(jax.value_and_grad(lambda g: total(in_place, g)))(placed)
        close(found, expected)
        y = jax.jit(in_place)(*placed)[1]["y"]
        assert y.sharding.spec[0] == "data"
