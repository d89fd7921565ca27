"""The TPU kernel of Newton-Schulz: interpreted on the CPU, and compiled for every TPU."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._tpu.vmem import vmem_limit_of
from pallas_kernels.newton_schulz import COEFFICIENTS, api, newton_schulz
from pallas_kernels.newton_schulz.pallas_tpu import (
    newton_schulz_pallas_tpu,
    vmem_bytes,
)
from pallas_kernels.newton_schulz.reference import newton_schulz_reference
from tests.kernels import tpu

SHAPES = [(8, 128), (2, 24, 16), (2, 1, 5, 7)]
kernel = functools.partial(newton_schulz_pallas_tpu, interpret=True)


def normalised(shape, dtype="float32", seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=(-2, -1), keepdims=True), dtype)


@pytest.mark.parametrize("variant", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_reference(shape, variant):
    x = normalised(shape)
    wide = x.astype(jnp.float32)
    found = kernel(x, COEFFICIENTS[variant], 5)
    expected = newton_schulz_reference(wide, COEFFICIENTS[variant], 5)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("variant", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_the_references(shape, variant):
    x, weight = normalised(shape), normalised(shape, seed=1)

    def total(form, x):
        return jnp.sum(weight * jnp.sin(3 * form(x, COEFFICIENTS[variant], 3)))

    found, expected = (
        jax.grad(functools.partial(total, form))(x) for form in (kernel, newton_schulz_reference)
    )
    np.testing.assert_allclose(found, expected, atol=5e-5 * float(jnp.abs(expected).max()))


def test_bfloat16_is_close():
    x = normalised((2, 16, 32), "bfloat16")
    found = kernel(x, COEFFICIENTS["quintic"], 5)
    expected = newton_schulz_reference(x.astype(jnp.float32), COEFFICIENTS["quintic"], 5)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.1)


def test_scale_and_zero_through_the_public_face(monkeypatch):
    """What normalises is in front of every implementation."""
    monkeypatch.setitem(api._IMPLEMENTATIONS, "pallas_tpu", kernel)
    form = functools.partial(newton_schulz, steps=3, implementation="pallas_tpu")
    x = normalised((2, 8, 16))
    for scale in (1e-30, 1e20, 1e38):
        np.testing.assert_allclose(form(scale * x), form(x), atol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(form(x))))(jnp.zeros((8, 16)))
    assert not form(jnp.zeros((8, 16))).any() and not np.asarray(slope).any()


def test_no_steps_and_no_matrices():
    x = normalised((2, 8, 8))
    np.testing.assert_array_equal(kernel(x, COEFFICIENTS["cubic"], 0), x)
    assert kernel(jnp.zeros((0, 8, 8)), COEFFICIENTS["cubic"], 2).shape == (0, 8, 8)


def test_what_it_cannot_take_is_refused(x64):
    with pytest.raises(NotImplementedError, match="4096 x 4096 needs .* MiB of VMEM, more than"):
        newton_schulz(jnp.zeros((4096, 4096), jnp.float32), implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, not float64"):
        newton_schulz(jnp.zeros((4, 4)), implementation="pallas_tpu")


def test_a_backward_pass_that_does_not_fit_says_so():
    x = normalised((8, 128))
    limit = vmem_bytes(8, 128, 4)
    run = functools.partial(kernel, coefficients=COEFFICIENTS["cubic"], steps=2, vmem_limit=limit)
    with pytest.warns(UserWarning, match="backward pass of newton_schulz on 8 x 128 needs"):
        found = jax.grad(lambda x: jnp.sum(run(x) ** 3))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = jax.grad(lambda x: jnp.sum(kernel(x, COEFFICIENTS["cubic"], 2) ** 3))(x)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", tpu.TPUS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiles_ahead_of_time(generation, dtype):
    """Forward at the width of the 340M preset where it fits, backward at half of it."""
    kind, coefficients = tpu.TPUS[generation].kind, COEFFICIENTS["quintic"]
    form = functools.partial(newton_schulz_pallas_tpu, vmem_limit=vmem_limit_of(kind))

    def forward(x):
        return form(x, coefficients, 5)

    def backward(x):
        return jax.grad(lambda x: jnp.sum(forward(x).astype(jnp.float32)))(x)

    width = 512 if generation == "v4" else 1024
    for function, side in ((forward, width), (backward, width // 2)):
        text = tpu.compiled(function, generation, ((2, side, side), dtype)).as_text()
        assert "tpu_custom_call" in text  # the kernel, not what it falls back to
