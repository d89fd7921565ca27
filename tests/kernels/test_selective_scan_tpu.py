"""The TPU kernel of the selective scan: interpreted on the CPU, and compiled for every TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._tpu.vmem import vmem_limit_of
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan.pallas_tpu import selective_scan_pallas_tpu, vmem_bytes
from pallas_kernels.selective_scan.reference import selective_scan_reference
from tests.kernels import tpu


def draw(lead=(2,), length=7, channels=5, states=3):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, step = normal(*lead, length, channels), jax.nn.softplus(normal(*lead, length, channels))
    decay = -jnp.exp(normal(channels, states))
    write, read = normal(*lead, length, states), normal(*lead, length, states)
    return x, step, decay, write, read, normal(*lead, channels, states)


def with_gradients(form, operands):
    """Outputs, last states, and the gradients of all that goes in."""

    def total(operands):
        y, final = form(*operands)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(final)), (y, final)

    return jax.grad(total, has_aux=True)(operands)


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ({}, 3),  # two whole chunks and a rest, channels that fill no register
        ({"lead": (2, 1), "length": 4, "channels": 128 * 9, "states": 2}, 64),  # two blocks of them
    ],
)
def test_forward_and_backward_are_the_recurrence(shape, chunk):
    operands = draw(**shape)
    kernel = functools.partial(selective_scan_pallas_tpu, chunk_size=chunk, interpret=True)
    found, expected = (
        jax.jit(functools.partial(with_gradients, form))(operands)
        for form in (kernel, selective_scan_reference)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(a, b, atol=2e-5 * scale)


def test_the_kernels_run_and_keep_one_state_a_chunk():
    operands = draw(length=16, channels=256, states=3)
    kernel = functools.partial(selective_scan_pallas_tpu, chunk_size=4, interpret=True)
    text = str(jax.make_jaxpr(functools.partial(with_gradients, kernel))(operands))
    assert "selective_scan_forward" in text and "selective_scan_backward" in text
    assert "f32[2,4,3,2,128]" in text  # [sequences, chunks, states, registers]
    assert "f32[2,16,3,2,128]" not in text


def test_no_tokens_leave_the_state():
    *operands, initial = draw(length=0)
    y, final = selective_scan_pallas_tpu(*operands, initial, chunk_size=4, interpret=True)
    assert y.shape == (2, 0, 5)
    np.testing.assert_array_equal(final, initial)


def test_what_it_cannot_take_is_refused(x64):
    names = ("x", "step", "decay", "write", "read", "initial")
    given = dict(zip(names, draw(), strict=True))
    wide = {name: a.astype(jnp.float64) for name, a in given.items()}
    with pytest.raises(NotImplementedError, match="state in float32, not float64"):
        selective_scan(**wide, implementation="pallas_tpu")
    many = dict(zip(names, draw(length=256, states=64), strict=True))
    with pytest.raises(NotImplementedError, match="256 tokens with 64 states needs .* MiB of VMEM"):
        selective_scan(**many, chunk_size=256, implementation="pallas_tpu")
    assert vmem_bytes(64, 16) < vmem_limit_of("TPU v4") < vmem_bytes(256, 64)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", tpu.TPUS)
@pytest.mark.parametrize("chunk", [16, 64])
def test_compiles_ahead_of_time(generation, chunk):
    """2,048 channels of 16 states, forward and backward."""
    limit = vmem_limit_of(tpu.TPUS[generation].kind)
    kernel = functools.partial(selective_scan_pallas_tpu, chunk_size=chunk, vmem_limit=limit)
    shapes = jax.eval_shape(lambda: draw((2,), 512, 2048, 16))
    function = functools.partial(with_gradients, kernel)
    text = tpu.compiled_tree(function, generation, shapes).as_text()
    assert text.count("tpu_custom_call") >= 2
