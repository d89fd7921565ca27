"""No tokens, no sequences, gates at the ends of their ranges, keys beyond theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention
from pallas_kernels.delta_rule import delta_chunk, delta_rule
from pallas_kernels.mlp_memory import FastWeights, mlp_memory
from pallas_kernels.selective_scan import selective_scan

N, M = 4, 3


def delta(batch, length):
    gates = {n: (batch, length) for n in ("learning_rate", "decay", "erase", "momentum")}
    rows = {n: (batch, length, N) for n in ("x", "queries")} | {"error": (batch, length, M)}
    return rows | gates | {"initial": (batch, M, N)}


def deep(batch, length):
    rows = {n: (batch, length, N) for n in ("keys", "values", "queries")}
    gates = {n: (batch, length) for n in ("learning_rate", "decay")}
    weights = FastWeights((batch, 2, M, N), (batch, 2, N, M), None, None)
    return rows | gates | {"initial": weights}


def scan(batch, length):
    rows = {n: (batch, length, M) for n in ("x", "step")}
    states = {n: (batch, length, N) for n in ("write", "read")}
    return rows | states | {"decay": (M, N), "initial": (batch, M, N)}


def heads(batch, length):
    return {n: (batch, length, 2, N) for n in ("queries", "keys", "values")}


CASES = {
    f"{name} {implementation}": (functools.partial(run, implementation=implementation), make)
    for name, run, make, implementations in (
        ("delta_rule", delta_rule, delta, ("reference", "xla", "pallas_tpu")),
        ("anchored", functools.partial(delta_rule, read="anchor"), delta, ("xla",)),
        ("delta_chunk", delta_chunk, delta, ("reference", "xla")),
        ("mlp_memory", mlp_memory, deep, ("reference", "xla", "pallas_tpu")),
        ("selective_scan", selective_scan, scan, ("reference", "xla")),
        ("attention", attention, heads, ("reference", "xla")),
    )
    for implementation in implementations
}


@pytest.mark.parametrize("batch, length", [(2, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("name", CASES)
def test_nothing_to_do_changes_nothing(name, batch, length):
    run, make = CASES[name]
    shapes = make(batch, length)
    given = jax.tree.map(lambda s: jnp.full(s, 0.5), shapes, is_leaf=lambda s: type(s) is tuple)
    out = run(**given)
    reads, *states = out if isinstance(out, tuple) else (out,)
    rows = given.get("queries", given["x"] if "x" in given else None)
    wide = M if "error" in given else rows.shape[-1]
    assert reads.shape == (*rows.shape[:-1], wide)
    if states:
        jax.tree.map(np.testing.assert_array_equal, states[0], given["initial"])
    gradient = jax.grad(lambda given: sum(map(jnp.sum, jax.tree.leaves(run(**given)))))(given)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(given), strict=True):
        assert a.shape == b.shape and np.all(np.isfinite(a))


LENGTH = 4096
GATES = {
    "all kept": lambda u: np.ones_like(u),
    "nearly all kept": lambda u: 1 - 1e-7 * u,
    "nothing kept": lambda u: np.zeros_like(u),
    "nearly nothing kept": lambda u: 1e-6 * u,
    "some forget all": lambda u: np.where(u < 0.05, 0.0, 1.0),
    "some forget nearly all": lambda u: np.where(u < 0.05, 1e-36, 1.0),
}


@functools.cache
def forms():
    """Reads, states and the gradient of both gates, of each form, compiled once."""

    def total(given, options):
        out = delta_rule(**given, read="running", **dict(options))
        return jnp.sum(jnp.sin(out.reads)) / LENGTH, (out.reads, out.final)

    return jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)


@pytest.mark.parametrize("gate", ["decay", "momentum"])
@pytest.mark.parametrize("case", GATES)
def test_gates_at_the_ends_of_their_range(case, gate):
    """4,096 tokens in float32 against the recurrence in float64: values and gradients.

    Through logarithms the gradient of a gate of 1e-36 would be rounding errors divided by 1e-36.
    """
    rng = np.random.default_rng(0)
    x, error, queries = rng.normal(size=(3, LENGTH, N))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    decay = np.full(LENGTH, 0.9)
    given = dict(x=x, error=error, queries=queries, initial=rng.normal(size=(N, N)), decay=decay)
    given |= {n: rng.uniform(0.1, 0.8, LENGTH) for n in ("learning_rate", "erase")}
    given |= {gate: GATES[case](rng.uniform(size=LENGTH))}
    given = {n: a.astype(np.float32) for n, a in given.items()}
    # else keys of a memory that is forgotten are subtracted from nothing
    given["erase"] = given["erase"] * given["decay"]
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(a, jnp.float64) for n, a in given.items()}
        (_, expected), of_expected = forms()(wide, (("implementation", "reference"),))
    given = {n: jnp.asarray(a) for n, a in given.items()}
    (_, found), gradient = forms()(given, (("chunk_size", 64),))
    pairs = [*zip(found, expected, strict=True), (gradient[gate], of_expected[gate])]
    tolerance = 2e-5 if gate == "decay" else 2e-4  # momentum sums up to 4,096 writes
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


def test_a_gate_outside_its_range_is_not_silent():
    given = {n: jnp.full(s, 0.5) for n, s in delta(1, 4).items()}
    given["decay"] = given["decay"].at[0, 1].set(-0.5)
    assert np.all(np.isnan(delta_rule(**given).final))


@pytest.mark.parametrize("strength", [1.9, 32.0])
def test_keys_that_are_too_long_overflow_in_every_form_alike(strength):
    """Bounded while erase |x|^2 <= 1 + decay; beyond it the recurrence itself leaves float32."""
    rng = np.random.default_rng(0)
    length, n = 256, 8
    x, error = rng.normal(size=(2, length, n))
    x *= np.sqrt(strength) / np.linalg.norm(x, axis=-1, keepdims=True)
    memory, finite = np.zeros((n, n), np.float32), []
    with np.errstate(all="ignore"):
        for key, value in zip(x.astype(np.float32), error.astype(np.float32), strict=True):
            memory = memory - np.outer(memory @ key, key) - np.outer(value, key)
            finite.append(bool(np.all(np.isfinite(memory))))
    first = finite.index(False) if False in finite else length
    assert (first < length) == (strength > 2)
    ones = jnp.ones(length)
    given = dict(initial=jnp.zeros((n, n)), erase=ones, queries=jnp.asarray(x, jnp.float32))
    for size in (16, 64):
        out = delta_rule(
            given["queries"], jnp.asarray(error, jnp.float32), ones, **given, chunk_size=size
        )
        until = int(np.argmin([*np.all(np.isfinite(out.reads), axis=-1), False]))
        assert first // size * size <= until <= first + 1
    assert np.all(np.isfinite(out.final)) == (first == length)
