"""Functions of several sequences in step, and pullbacks taken apart: parts of a chunk loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._tpu.lockstep import Window, lockstep, value_of
from pallas_kernels._tpu.pullback import split_pullback


def shapes(*arrays):
    return tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)


def test_every_sequence_has_its_own_result():
    given = [jnp.full((2, 3), float(s)) for s in range(3)]

    def function(x, y):
        return {"sum": x + jax.jit(jnp.sin)(y), "same": x, "constant": 2.0 * jnp.ones(())}

    found = lockstep(function, shapes(given[0], given[0]), [[x, 2 * x] for x in given])
    for x, out in zip(given, found, strict=True):
        np.testing.assert_allclose(out["sum"], x + np.sin(2 * x), rtol=1e-6)
        np.testing.assert_array_equal(out["same"], x)


def test_windows_are_read_and_written():
    """A result that is kept is written at once, once for each place that it is wanted in."""
    memory = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    first, second = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)

    def function(x):
        y = x * x
        return y, y, x

    kept = [[Window(first, s), Window(second, s), None] for s in range(2)]
    out = lockstep(function, shapes(memory[0]), [[Window(memory, s)] for s in range(2)], kept)
    np.testing.assert_array_equal(first, memory**2)
    np.testing.assert_array_equal(second, memory**2)
    np.testing.assert_array_equal(value_of(out[1][2]), memory[1])


def test_a_pullback_taken_apart_is_the_pullback():
    rng = np.random.default_rng(0)
    a, b, c = (jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for _ in range(3))

    def function(a, b):
        h = jnp.tanh(a @ b)
        return h + a, jnp.where(h > 0, 2.0 * h, 0.5) @ jnp.broadcast_to(b[:1], b.shape)

    split = split_pullback(function, shapes(a, b))
    out, kept = jax.jit(split.run)(a, b)
    np.testing.assert_allclose(out, function(a, b)[0], rtol=1e-6)
    found = split.back((a, b), kept, (c, 2 * c))
    expected = jax.vjp(function, a, b)[1]((c, 2 * c))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    again = (a, b, jnp.broadcast_to(b[:1], b.shape))  # what is at hand, or cheaply made
    assert not any(np.array_equal(x, y) for x in kept for y in again)


def test_a_pullback_of_single_numbers_is_refused():
    with pytest.raises(NotImplementedError, match="the pullback keeps"):
        split_pullback(lambda a: (a, jnp.sum(jnp.sin(a)) ** 3.5), shapes(jnp.ones(3)))
