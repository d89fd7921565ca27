"""The selective scan against a numpy loop, its gradients, and inputs that are hard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import api, selective_scan

BATCH, LENGTH, CHANNELS, STATES = 2, 13, 3, 4


def draw(seed=0, length=LENGTH, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shape = (BATCH, length)
    arrays = {
        "x": rng.normal(size=(*shape, CHANNELS)),
        "step": rng.uniform(0.01, 1.0, size=(*shape, CHANNELS)),
        "decay": -rng.uniform(0.1, 4.0, size=(CHANNELS, STATES)),
        "write": rng.normal(size=(*shape, STATES)),
        "read": rng.normal(size=(*shape, STATES)),
        "skip": rng.normal(size=CHANNELS),
        "initial": rng.normal(size=(BATCH, CHANNELS, STATES)),
    }
    return {name: jnp.asarray(a.astype(dtype)) for name, a in arrays.items()}


def loop(x, step, decay, write, read, skip, initial):
    """Each number by itself."""
    y, h = np.zeros(x.shape), np.array(initial)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for d in range(x.shape[2]):
                for n in range(decay.shape[1]):
                    kept = np.exp(step[b, t, d] * decay[d, n]) * h[b, d, n]
                    h[b, d, n] = kept + step[b, t, d] * x[b, t, d] * write[b, t, n]
                y[b, t, d] = h[b, d] @ read[b, t] + skip[d] * x[b, t, d]
    return y, h


@pytest.fixture(params=["token by token", "in parallel"])
def inside(request, monkeypatch):
    """How a chunk is gone through: on a CPU, and on everything else."""
    monkeypatch.setattr(api, "_on_cpu", lambda: request.param == "token by token")
    return request.param


FORMS = {
    "reference": {"implementation": "reference"},
    "xla in ones": {"chunk_size": 1},
    "xla with a rest": {"chunk_size": 5},
    "xla at once": {"chunk_size": 64},
}


@pytest.mark.parametrize("form", FORMS)
def test_matches_numpy(x64, inside, form):
    arrays = draw()
    got = selective_scan(**arrays, **FORMS[form])
    for a, b in zip(got, loop(**{n: np.asarray(a) for n, a in arrays.items()}), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 5])
def test_gradients_match_the_recurrence(x64, inside, chunk):
    arrays = draw()

    def total(form, arrays):
        out = form(**arrays)
        return jnp.sum(jnp.sin(out.outputs)) + jnp.sum(jnp.cos(out.final))

    forms = (
        functools.partial(selective_scan, implementation="reference"),
        functools.partial(selective_scan, chunk_size=chunk),
    )
    expected, got = (jax.jit(jax.grad(functools.partial(total, form)))(arrays) for form in forms)
    for name in arrays:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-9, atol=1e-10, err_msg=name)


def test_any_split_equals_one_call(x64):
    arrays = draw()
    whole = selective_scan(**arrays, chunk_size=4)
    state, outputs = arrays["initial"], []
    for part in (slice(0, 3), slice(3, 4), slice(4, LENGTH)):
        pieces = {n: arrays[n][:, part] for n in ("x", "step", "write", "read")}
        more = {"decay": arrays["decay"], "skip": arrays["skip"]}
        out, state = selective_scan(**pieces, **more, initial=state, chunk_size=4)
        outputs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole.outputs, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state, whole.final, rtol=1e-12, atol=1e-12)


def test_causal_and_isolated_exactly(inside):
    arrays = draw(dtype=np.float32)
    base = selective_scan(**arrays, chunk_size=4)
    other = selective_scan(**{**arrays, "x": arrays["x"].at[1, 6].add(1.0)}, chunk_size=4)
    np.testing.assert_array_equal(base.outputs[0], other.outputs[0])
    np.testing.assert_array_equal(base.outputs[1, :6], other.outputs[1, :6])
    assert bool(jnp.all(base.outputs[1, 6:] != other.outputs[1, 6:]))


@functools.cache
def with_gradients(inside):
    """Compiled once for each way through a chunk, which is chosen when it is traced."""

    def total(arrays):
        out = selective_scan(**arrays, chunk_size=32)
        return jnp.sum(out.outputs), out

    return jax.jit(jax.grad(total, has_aux=True))


@pytest.mark.parametrize("case", ["no step", "long step", "no decay"])
def test_hard_inputs_in_float32(inside, case):
    arrays = draw(length=300, dtype=np.float32)
    if case == "no step":
        arrays["step"] = jnp.zeros_like(arrays["step"])
    if case == "long step":
        arrays["step"] = arrays["step"] * 1e3
    if case == "no decay":
        arrays["decay"] = jnp.zeros_like(arrays["decay"])
    grads, (out, final) = with_gradients(inside)(arrays)
    wide = {n: np.asarray(a, np.float64) for n, a in arrays.items()}
    expected = loop(**wide)
    scale = max(1.0, float(np.abs(expected[0]).max()))
    np.testing.assert_allclose(out, expected[0], rtol=1e-4, atol=1e-5 * scale)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
    if case == "no step":
        np.testing.assert_array_equal(final, arrays["initial"])


def test_states_stay_float32_under_bfloat16():
    arrays = {n: a.astype(jnp.bfloat16) for n, a in draw(dtype=np.float32).items()}
    out, final = selective_scan(**arrays)
    assert (out.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, "implementation='cuda' is not one of reference, xla"),
        ({"chunk_size": 0}, "chunk_size=0 must be an integer, at least 1"),
        ({"decay": jnp.zeros((2, 4))}, r"decay has shape \(2, 4\), expected \[D, N\]"),
        ({"step": jnp.zeros((2, 1, 3))}, r"step has shape \(2, 1, 3\), expected \(2, 13, 3\)"),
        ({"initial": jnp.zeros((3, 4))}, r"initial has shape \(3, 4\), expected \(2, 3, 4\)"),
    ],
)
def test_bad_input_says_what(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**draw(dtype=np.float32), **change})


def test_what_is_not_written_says_so():
    with pytest.raises(NotImplementedError, match="no implementation='pallas_gpu': use 'xla'"):
        selective_scan(**draw(dtype=np.float32), implementation="pallas_gpu")
