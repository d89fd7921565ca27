"""Newton-Schulz against the singular value decomposition and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.newton_schulz import newton_schulz

SHAPES = [(3, 5), (2, 1, 6, 4)]
fast = jax.jit(newton_schulz, static_argnames=("variant", "steps", "implementation"))


def matrices(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def polynomial(s, variant, steps):
    """The iteration on singular values: what it does to U and V is nothing."""
    for _ in range(steps):
        if variant == "cubic":
            s = 1.5 * s - 0.5 * s**3
        else:
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("variant", ["cubic", "quintic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_a_polynomial_of_the_singular_values(x64, shape, variant, implementation):
    x = matrices(shape)
    u, s, vt = np.linalg.svd(np.asarray(x), full_matrices=False)
    s = s / np.linalg.norm(s, axis=-1, keepdims=True)
    expected = (u * polynomial(s, variant, 4)[..., None, :]) @ vt
    found = fast(x, variant=variant, steps=4, implementation=implementation)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 5), (2, 6, 4)])
def test_cubic_converges_to_the_polar_factor(x64, shape):
    x = matrices(shape, 1)
    u, _, vt = np.linalg.svd(np.asarray(x), full_matrices=False)
    np.testing.assert_allclose(newton_schulz(x, variant="cubic", steps=60), u @ vt, atol=1e-10)


def test_quintic_ends_in_a_band_around_one(x64):
    s = np.linalg.svd(np.asarray(newton_schulz(matrices((64, 128)))), compute_uv=False)
    assert 0.65 < s.min() < s.max() < 1.2 and s.max() - s.min() > 0.1


def test_cubic_step_descends_the_orthogonality_loss(x64):
    """Oracle 11: one step = gradient descent with step 1/2 on 1/4 |X^T X - I|^2."""
    x = matrices((6, 4), 2)
    x = x / jnp.linalg.norm(x)
    gradient = np.zeros((6, 4))
    for i, j in np.ndindex(6, 4):
        nudge = np.zeros((6, 4))
        nudge[i, j] = 1e-6
        loss = [np.sum((m.T @ m - np.eye(4)) ** 2) / 4 for m in (x + nudge, x - nudge)]
        gradient[i, j] = (loss[0] - loss[1]) / 2e-6
    found = newton_schulz(x, variant="cubic", steps=1)
    np.testing.assert_allclose(found, x - gradient / 2, atol=1e-8)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_scale_of_the_input_does_not_matter(implementation):
    """Over the whole range of float32, where squares of most numbers are 0 or infinite."""
    x = matrices((2, 3, 4), 3)
    expected = fast(x, implementation=implementation)
    for scale in (1e-35, 1e-15, 7.3, 1e20, 1e38):
        found = fast(scale * x, implementation=implementation)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(scale))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_zero_and_what_is_not_finite(implementation):
    def total(x):
        return jnp.sum(jnp.sin(newton_schulz(x, implementation=implementation)))

    for shape in ((3, 4), (0, 4), (2, 0, 0)):
        zero = jnp.zeros(shape)
        assert newton_schulz(zero, implementation=implementation).shape == shape
        value, slope = jax.value_and_grad(total)(zero)
        assert value == 0 and not np.asarray(slope).any()
    for bad in (jnp.nan, jnp.inf):
        found = newton_schulz(jnp.ones((2, 2)).at[0, 0].set(bad), implementation=implementation)
        assert not np.isfinite(found).all()


def test_gradients_of_the_implementations_agree(x64):
    x = matrices((2, 3, 4), 3)
    slopes = [
        jax.jit(jax.grad(lambda x, i=i: jnp.sum(jnp.sin(newton_schulz(x, implementation=i)))))(x)
        for i in ("reference", "xla")
    ]
    np.testing.assert_allclose(*slopes, atol=1e-10)


def test_dtypes():
    x = matrices((4, 6)).astype(jnp.bfloat16)
    assert newton_schulz(x).dtype == jnp.bfloat16
    low = newton_schulz(x.astype(jnp.float32), dtype=jnp.bfloat16)
    full = newton_schulz(x.astype(jnp.float32))
    assert low.dtype == jnp.float32 and 0 < float(jnp.max(jnp.abs(low - full))) < 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "linear"}, "variant='linear' is not one of quintic, cubic"),
        ({"steps": -1}, "steps=-1 must be an integer"),
        ({"implementation": "cuda"}, "implementation='cuda'"),
        ({"x": jnp.zeros(3)}, r"got shape \(3,\)"),
    ],
)
def test_bad_input_says_what(change, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(**{"x": jnp.zeros((2, 2)), **change})


def test_what_is_not_written_says_so():
    with pytest.raises(NotImplementedError, match="no implementation='pallas_gpu': use 'xla'"):
        newton_schulz(jnp.eye(2), implementation="pallas_gpu")
