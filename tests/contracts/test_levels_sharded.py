"""Levels over a batch split between devices, in Explicit mode: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nestedjax import levels
from tests.contracts.test_levels import SYSTEMS, build
from tests.levels.test_compose import make_nested, nested_params


def adaptive():
    """A linear next-number model in which nothing is looked up."""

    def loss(params, outputs, labels):
        return jnp.sum((outputs - labels) ** 2, axis=1)

    return levels.adaptive_level(
        "model",
        4,
        forward=lambda params, fast, carry, x: (x @ fast, carry + x.sum(0)),
        loss=loss,
        tx=lambda params: optax.sgd(params["rate"], momentum=0.5),
        init_fast=lambda params: params["fast"],
        init_carry=lambda params: jnp.zeros(3),
        token=jax.ShapeDtypeStruct((3,), jnp.float32),
    )


def cases():
    rng = np.random.default_rng(0)
    yield "chain", *build(SYSTEMS["three"])
    yield "incremental", *build(SYSTEMS["incremental"])
    yield "nested", make_nested(), nested_params()
    fast = rng.standard_normal((3, 3)).astype(np.float32)
    yield "adaptive", adaptive(), {"fast": fast, "rate": np.asarray(0.05, np.float32)}


@pytest.mark.parametrize("name,system,params", list(cases()))
def test_a_batch_on_four_devices(name, system, params):
    x = np.random.default_rng(1).standard_normal((4, 19, 3)).astype(np.float32)

    def loss(params, x):
        init = system.init(params)
        y, carry = jax.vmap(lambda x: levels.run(system, params, init, x))(x[:, :10])
        z, carry = jax.vmap(lambda c, x: levels.run(system, params, c, x))(carry, x[:, 10:18])
        w, _ = levels.run_batch(system, params, carry, x[:, 18:])  # one token of each
        return jnp.sum(y**2) + jnp.sum(z**2) + jnp.sum(w**2)

    expected = jax.jit(jax.value_and_grad(loss))(params, x)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])  # Explicit axes
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(jax.value_and_grad(loss))(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
