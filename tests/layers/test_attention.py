"""Sliding-window attention against a numpy loop, in every way of cutting and packing a sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax.layers.window_attention import attention, init_attention
from pallas_kernels.attention import api
from pallas_kernels.attention.pallas_tpu import attention_pallas_tpu

BATCH, LENGTH, HEADS, DIM, WINDOW = 2, 14, 2, 4, 5
JITTED = jax.jit(attention, static_argnames=("window", "theta"))


def make(length=LENGTH, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(BATCH, length, HEADS, DIM)), dtype) for _ in range(3)]


def turn(x, position, theta=1e4):
    """Rotary embedding of one vector, one plane at a time."""
    out = np.array(x, np.float64)
    half = len(x) // 2
    for i in range(half):
        angle = position * theta ** (-i / half)
        pair = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        out[[i, i + half]] = pair @ np.asarray(x, np.float64)[[i, i + half]]
    return out


def numpy_attention(queries, keys, values, window, resets=None, theta=1e4):
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    out = np.zeros_like(values)
    for b in range(queries.shape[0]):
        starts = [0] * queries.shape[1]
        for t in range(1, queries.shape[1]):
            starts[t] = t if resets is not None and resets[b, t] else starts[t - 1]
        for t, first in enumerate(starts):
            seen = range(max(first, t - window + 1), t + 1)
            for h in range(queries.shape[2]):
                q = turn(queries[b, t, h], t - first, theta)
                score = [q @ turn(keys[b, s, h], s - first, theta) / np.sqrt(DIM) for s in seen]
                weight = np.exp(np.array(score) - max(score))
                out[b, t, h] = weight @ values[b, seen, h] / weight.sum()
    return out


@pytest.mark.parametrize("window", [1, WINDOW, LENGTH, 40])
def test_equals_the_loop(x64, window):
    q, k, v = make()
    y, state = JITTED(q, k, v, window=window, theta=100.0)
    np.testing.assert_allclose(y, numpy_attention(q, k, v, window, theta=100.0), atol=1e-12)
    assert state.position.tolist() == [LENGTH] * BATCH
    assert state.keys.shape == (BATCH, window, HEADS, DIM)


RESETS = np.zeros((BATCH, LENGTH), bool)
RESETS[0, [3, 4, 11]] = RESETS[1, [0, 8]] = True


@pytest.mark.parametrize("resets", [None, RESETS], ids=["one document", "packed"])
@pytest.mark.parametrize("cuts", [[7], [1, 2, 9, 13], list(range(1, LENGTH))])
def test_any_split_equals_the_loop(x64, cuts, resets):
    """Pieces shorter and longer than the window; resets fall on and off the cuts."""
    q, k, v = make()
    state, pieces = init_attention(BATCH, WINDOW, HEADS, DIM, "float64"), []
    for first, last in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        part = [x[:, first:last] for x in (q, k, v)]
        here = None if resets is None else jnp.asarray(resets[:, first:last])
        before = jax.tree.map(lambda a: (a.shape, a.dtype), state)
        y, state = JITTED(*part, state, window=WINDOW, resets=here)
        assert before == jax.tree.map(lambda a: (a.shape, a.dtype), state)
        pieces.append(y)
    expected = numpy_attention(q, k, v, WINDOW, resets)
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, atol=1e-12)


@pytest.mark.parametrize("window", [WINDOW, 40])
def test_packed_documents_equal_the_loop_in_one_call(x64, window):
    q, k, v = make()
    y, state = JITTED(q, k, v, window=window, resets=jnp.asarray(RESETS))
    np.testing.assert_allclose(y, numpy_attention(q, k, v, window, RESETS), atol=1e-12)
    assert state.position.tolist() == [LENGTH - 11, LENGTH - 8]


def test_causal_and_isolated_exactly():
    q, k, v = make(dtype=np.float32)
    base, _ = JITTED(q, k, v, window=WINDOW)
    at = 6
    changed, _ = JITTED(*(x.at[1, at].add(1.0) for x in (q, k, v)), window=WINDOW)
    np.testing.assert_array_equal(base[0], changed[0])
    np.testing.assert_array_equal(base[1, :at], changed[1, :at])
    far = at + WINDOW  # out of the window again
    assert np.all(np.any(base[1, at:far] != changed[1, at:far], axis=(-1, -2)))
    np.testing.assert_array_equal(base[1, far:], changed[1, far:])


def test_attention_solves_the_kernel_weighted_regression(x64):
    """Oracle 27: y_t = argmin_m sum_s exp(q_t . k_s / sqrt(d)) |v_s - m|^2, found by descent."""
    q, k, v = make(length=6)
    y, _ = JITTED(q, k, v, window=6)
    queries, keys, values = (np.asarray(x) for x in (q, k, v))
    for t in range(6):
        rows = [turn(keys[0, s, 1], s) for s in range(t + 1)]
        kernel = np.exp(np.array(rows) @ turn(queries[0, t, 1], t) / np.sqrt(DIM))
        m, step = np.zeros(DIM), 0.5 / kernel.sum()
        for _ in range(60):
            m = m - step * (kernel[:, None] * (m - values[0, : t + 1, 1])).sum(0)
        np.testing.assert_allclose(y[0, t, 1], m, atol=1e-10)
        at_y = (kernel[:, None] * (np.asarray(y[0, t, 1]) - values[0, : t + 1, 1])).sum(0)
        np.testing.assert_allclose(at_y, 0, atol=1e-10)


def test_gradients_are_finite_differences(x64):
    """Through blocks that are recomputed in the backward pass."""
    q, k, v = make()

    @jax.jit
    def loss(given):
        return jnp.sum(jnp.sin(attention(*given, window=WINDOW)[0]))

    gradient = jax.jit(jax.grad(loss))((q, k, v))
    rng = np.random.default_rng(1)
    for index in range(3):
        direction = rng.normal(size=q.shape)
        moved = [list((q, k, v)), list((q, k, v))]
        for sign, given in zip((1, -1), moved, strict=True):
            given[index] = given[index] + sign * 1e-6 * direction
        numeric = (loss(tuple(moved[0])) - loss(tuple(moved[1]))) / 2e-6
        exact = jnp.sum(gradient[index] * direction)
        assert abs(float(exact)) > 1e-3
        np.testing.assert_allclose(exact, numeric, rtol=1e-6)


def test_dtypes_are_kept():
    q, k, v = (x.astype(jnp.bfloat16) for x in make(dtype=np.float32))
    y, state = JITTED(q, k, v, window=WINDOW)
    assert y.dtype == state.keys.dtype == state.values.dtype == jnp.bfloat16
    assert state.position.dtype == jnp.int32
    wide = numpy_attention(*(np.asarray(x, np.float32) for x in (q, k, v)), WINDOW)
    np.testing.assert_allclose(np.asarray(y, np.float32), wide, atol=0.05)


@pytest.mark.parametrize("packed", [False, True])
def test_on_a_tpu_a_long_fresh_sequence_is_one_kernel(monkeypatch, packed):
    """Instead of blocks of the window; interpreted here, and the choice of device pretended."""
    q, k, v = make(length=140, dtype=np.float32)
    resets = jnp.zeros((BATCH, 140), bool).at[0, 9].set(True) if packed else None
    in_blocks, state = JITTED(q, k, v, window=20, resets=resets)
    interpreted = functools.partial(attention_pallas_tpu, interpret=True)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "pallas_tpu", interpreted)
    monkeypatch.setattr(api, "_platform", lambda: "tpu")
    there = jax.jit(functools.partial(attention, window=20))
    text = str(jax.make_jaxpr(there)(q, k, v, resets=resets))
    assert "splash_mha_fwd" in text and "dynamic_slice" not in text
    y, after = there(q, k, v, resets=resets)
    np.testing.assert_allclose(y, in_blocks, atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, state, after)


def test_on_a_gpu_documents_stay_in_blocks(monkeypatch):
    """cuDNN would take them as a mask of all pairs of tokens."""
    q, k, v = (x.astype(jnp.bfloat16) for x in make(length=40, dtype=np.float32))
    monkeypatch.setattr(api, "_platform", lambda: "cuda")
    asked = []
    cudnn = lambda q, k, v, masks, scale: asked.append((masks, k.shape[1])) or q  # noqa: E731
    monkeypatch.setitem(api._IMPLEMENTATIONS, "cudnn", cudnn)
    monkeypatch.setattr(api.cudnn, "refusal", lambda *_: None)
    attention(q, k, v, window=8)
    attention(q, k, v, window=8, resets=jnp.zeros((BATCH, 40), bool))
    (whole, tokens), (block, near) = asked
    assert (whole.window, whole.documents, tokens) == (8, None, 40)
    assert (block.window, near) == (8, 16) and block.documents is not None
