"""Forward mode through every operation: against the recurrences, and refused by the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._linalg.derivatives import differentiable, reverse_only
from pallas_kernels.attention import attention
from pallas_kernels.delta_rule import delta_chunk, delta_rule
from pallas_kernels.mlp_memory import mlp_memory
from pallas_kernels.selective_scan import selective_scan
from tests.kernels import test_delta_rule, test_mlp_memory, test_selective_scan


def delta():
    return test_delta_rule.operands(np.random.default_rng(0), ("decay", "erase", "momentum"))


def deep(dtype=jnp.float64):
    given = test_mlp_memory.operands(dtype, **test_mlp_memory.CASES["self-modifying"])
    return {name: a for name, a in given.items() if name != "rule"}


def heads():
    made = np.random.default_rng(0).normal(size=(3, 1, 5, 2, 3))
    return {name: jnp.asarray(made[i]) for i, name in enumerate(("queries", "keys", "values"))}


OPERATIONS = {
    "delta_rule": (delta_rule, delta, dict(chunk_size=4)),
    "delta_chunk": (delta_chunk, delta, {}),
    "mlp_memory": (mlp_memory, deep, dict(chunk_size=4)),
    "selective_scan": (selective_scan, test_selective_scan.draw, dict(chunk_size=4)),
    "attention": (attention, heads, {}),
}


def moved(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), tree)


@pytest.mark.parametrize("name", OPERATIONS)
def test_tangents_are_those_of_the_recurrence_and_the_transpose_of_the_gradient(name, x64):
    operation, make, options = OPERATIONS[name]
    given = make()
    tangents = moved(given, 1)

    def run(given, implementation):
        return operation(**given, **options, implementation=implementation)

    def along(implementation):
        return jax.jvp(lambda given: run(given, implementation), (given,), (tangents,))[1]

    @jax.jit
    def both(given):
        out, pull = jax.vjp(lambda given: run(given, "xla"), given)
        return out, pull(moved(out, 2))[0]

    if name == "attention":  # its XLA form computes in float32
        found = along("reference")
        step = jax.tree.map(lambda a, t: a + 1e-6 * t, given, tangents)
        expected = (run(step, "reference") - run(given, "reference")) / 1e-6
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        return
    found, expected = jax.jit(along, static_argnums=0)("xla"), along("reference")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected
    )
    out, gradient = both(given)

    def inner(a, b):
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.sum(a * b)), a, b)))

    assert inner(found, moved(out, 2)) == pytest.approx(inner(tangents, gradient), rel=1e-9)


def test_hessians_of_every_order_of_modes_agree(x64):
    given = delta()
    del given["momentum"], given["initial_momentum"]

    def loss(keys, implementation):
        out = delta_rule(**{**given, "x": keys}, chunk_size=4, implementation=implementation)
        return jnp.sum(jnp.sin(out.reads)) + jnp.sum(out.final**3)

    keys = given["x"][:1, :5]
    given = {
        n: a[:1, :5] if a.ndim < 3 or n in ("error", "queries") else a[:1] for n, a in given.items()
    }
    expected = jax.hessian(lambda x: loss(x, "reference"))(keys)
    forward, reverse = jax.jacfwd, jax.jacrev
    for outer, inner in ((forward, reverse), (reverse, reverse), (forward, forward)):
        found = jax.jit(outer(inner(lambda x: loss(x, "xla"))))(keys)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
    mapped = jax.vmap(jax.hessian(lambda x: loss(x, "xla")))(jnp.stack([keys, keys]))
    np.testing.assert_allclose(mapped[1], expected, rtol=1e-8, atol=1e-8)


def test_a_transpose_of_ones_own_is_what_reverse_mode_calls():
    """A derivative with a mistake in its transpose: forward mode does not see it."""
    double = differentiable(
        lambda x: 2 * x,
        lambda x: (2 * x, None),
        lambda kept, tangents: 2 * tangents[0],
        lambda kept, g: (7 * g,),
    )
    one = jnp.ones(3)
    np.testing.assert_array_equal(jax.jvp(double, (one,), (one,))[1], 2 * one)
    for f in (double, jax.jit(double), jax.vmap(double)):
        np.testing.assert_array_equal(jax.grad(lambda x, f=f: jnp.sum(f(x)))(one), 7 * one)


MODES = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "hessian": lambda f, x: jax.hessian(f)(x),
    "in jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "of jit": lambda f, x: jax.jit(jax.hessian(f))(x),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_kernel_says_which_form_has_forward_mode(mode):
    @jax.custom_vjp
    def kernel(x):
        return 2 * x

    kernel.defvjp(lambda x: (kernel(x), None), lambda kept, g: (2 * g,))

    def operation(x):
        return jnp.sum(kernel(reverse_only({"x": x}, "op(implementation='pallas_tpu')")["x"]))

    x = jnp.ones(3)
    np.testing.assert_array_equal(jax.grad(operation)(x), 2 * x)
    mapped = jax.grad(lambda x: jnp.sum(jax.vmap(operation)(jnp.stack([x, x]))))
    np.testing.assert_array_equal(jax.jit(mapped)(x), 4 * x)
    with pytest.raises(NotImplementedError, match="use implementation='xla'"):
        MODES[mode](operation, x)


@pytest.mark.parametrize("name", ["delta_rule", "mlp_memory", "selective_scan"])
def test_kernels_are_behind_that_refusal(name):
    operation, make, options = OPERATIONS[name]
    given = make(jnp.float32) if name == "mlp_memory" else make()
    given = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), given)
    run = lambda given: operation(**given, **options, implementation="pallas_tpu")  # noqa: E731
    with pytest.raises(NotImplementedError, match="for forward mode"):
        jax.jvp(run, (given,), (given,))
