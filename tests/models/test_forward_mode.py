"""Forward mode through whole models, and second derivatives through a memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nestedjax import levels
from nestedjax import memory as nm
from tests.memory import points
from tests.models import families

SLOW = pytest.param("hope_in_context", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["hope", SLOW, "gated_deltanet", "transformer"])
def test_the_tangent_of_a_loss_is_its_gradient_along_it(name):
    graphdef, weights = families.built(families.FAMILIES[name])
    tokens = families.tokens_of(8)

    def loss(weights):
        logits, _ = nnx.merge(graphdef, weights)(tokens)
        return jnp.mean(families.token_losses(logits, tokens))

    rng = np.random.default_rng(3)
    along = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), weights)

    @jax.jit
    def both(weights, along):
        gradient = jax.grad(loss)(weights)
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, along)
        return jax.jvp(loss, (weights,), (along,))[1], sum(jax.tree.leaves(products))

    tangent, expected = both(weights, along)
    assert float(tangent) != 0
    np.testing.assert_allclose(tangent, expected, rtol=1e-3)


@pytest.mark.parametrize("names", [points.CORE[i] for i in (1, 3, 4, 5)], ids="-".join)
def test_the_hessian_of_a_memory(names, x64):
    """By its initial weights, through chunks, against the reference's: `jax.hessian` as it is."""
    params, x = points.params(names, jnp.float64), points.tokens(names, 4, np.float64)

    def hessian(implementation):
        level = points.level(names, 2, implementation=implementation)

        def loss(params):
            y, _ = levels.run(level, params, level.init(params), x)
            return jnp.sum(jnp.sin(y))

        return jax.jit(jax.hessian(loss))(params)

    found, expected = hessian("xla"), hessian("reference")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), found, expected)


def test_a_level_of_a_kernel_says_what_has_forward_mode():
    level = nm.gated_delta_net(4, 4, chunk_size=2, implementation="pallas_tpu")
    params, x = (jnp.ones((4, 4)),), points.tokens(("matrix", "dot", "decay", "gradient"), 4)
    assert level.whole is not None

    def run(params):
        return level.whole(params, level.init(params), x, None)[1]

    with pytest.raises(NotImplementedError, match="use implementation='xla'"):
        jax.jvp(run, (params,), (params,))
