"""The delta rule: every form against the recurrence in numpy, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import delta_chunk, delta_rule

GATES = [
    (),
    ("decay",),
    ("erase",),
    ("decay", "erase"),
    ("momentum",),
    ("decay", "erase", "momentum"),
]


def operands(rng, gates, *, length=11, n=4, m=5, batch=(2,)):
    given = dict(
        x=rng.normal(size=(*batch, length, n)),
        error=rng.normal(size=(*batch, length, m)),
        learning_rate=rng.uniform(0.05, 0.5, (*batch, length)),
        initial=rng.normal(size=(*batch, m, n)),
        queries=rng.normal(size=(*batch, length, n)),
    )
    given["x"] /= np.linalg.norm(given["x"], axis=-1, keepdims=True)
    ranges = {"decay": (0.7, 1.0), "erase": (0.1, 0.9), "momentum": (0.2, 0.9)}
    for gate in gates:
        given[gate] = rng.uniform(*ranges[gate], (*batch, length))
    if "momentum" in gates:
        given["initial_momentum"] = rng.normal(size=(*batch, m, n)) * 0.1
    return {name: jnp.asarray(value) for name, value in given.items()}


def numpy_recurrence(given, read):
    given = {name: np.asarray(value, np.float64) for name, value in given.items()}
    x, error, learning_rate = given["x"], given["error"], given["learning_rate"]
    reads = np.zeros(error.shape)
    finals, velocities = [], []
    for b in range(len(x)):
        weight = start = given["initial"][b]
        velocity = given["initial_momentum"][b] if "momentum" in given else 0.0
        for t in range(x.shape[1]):
            before = weight
            decay = given["decay"][b, t] if "decay" in given else 1.0
            erase = given["erase"][b, t] if "erase" in given else 0.0
            momentum = given["momentum"][b, t] if "momentum" in given else 0.0
            velocity = momentum * velocity - learning_rate[b, t] * np.outer(error[b, t], x[b, t])
            transition = decay * np.eye(x.shape[-1]) - erase * np.outer(x[b, t], x[b, t])
            weight = weight @ transition + velocity
            source = {"running_prev": before, "running": weight, "anchor": start}[read]
            reads[b, t] = source @ given["queries"][b, t]
        finals.append(weight)
        velocities.append(velocity)
    return reads, np.stack(finals), np.stack(velocities) if "momentum" in given else None


@pytest.mark.parametrize("read", ["running_prev", "running", "anchor"])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("form", ["reference", "chunk", "chunks of 4", "chunks of 1"])
def test_matches_numpy(x64, gates, read, form):
    given = operands(np.random.default_rng(0), gates)
    reads, final, velocity = numpy_recurrence(given, read)
    if form == "chunk":
        out = delta_chunk(**given, read=read)
    elif form == "reference":
        out = delta_rule(**given, read=read, implementation="reference")
    else:
        out = delta_rule(**given, read=read, chunk_size=int(form.split()[-1]))
    np.testing.assert_allclose(out.reads, reads, atol=1e-10)
    np.testing.assert_allclose(out.final, final, atol=1e-10)
    assert (out.final_momentum is None) == (velocity is None)
    if velocity is not None:
        np.testing.assert_allclose(out.final_momentum, velocity, atol=1e-10)


@pytest.mark.parametrize("gates", GATES)
def test_gradients_match_the_recurrence(x64, gates):
    given = operands(np.random.default_rng(1), gates)

    def loss(values, implementation):
        out = delta_rule(**values, implementation=implementation, chunk_size=4)
        return jnp.sum(jnp.sin(out.reads)) + jnp.sum(jnp.cos(out.final))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected, actual = gradient(given, "reference"), gradient(given, "xla")
    for name in given:
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-10, err_msg=name)
        assert float(jnp.max(jnp.abs(actual[name]))) > 0, name


HARD = {
    "decay 1e-4": lambda g: {"decay": jnp.full_like(g["learning_rate"], 1e-4)},
    "decay 1": lambda g: {"decay": jnp.ones_like(g["learning_rate"])},
    "learning rate 0": lambda g: {"learning_rate": jnp.zeros_like(g["learning_rate"])},
    "learning rate 1": lambda g: {
        "learning_rate": jnp.ones_like(g["learning_rate"]),
        "erase": jnp.ones_like(g["learning_rate"]),
    },
    "zero keys": lambda g: {"x": jnp.zeros_like(g["x"])},
    "repeated keys": lambda g: {"x": jnp.broadcast_to(g["x"][:, :1], g["x"].shape)},
    "momentum 0": lambda g: {"momentum": jnp.zeros_like(g["learning_rate"])},
}


@jax.jit
def chunk_and_gradient(given):
    """Compiled once for all cases of a length."""
    gradient = jax.grad(lambda g: jnp.sum(delta_chunk(**g).reads ** 2))(given)
    return delta_chunk(**given), gradient


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("length", [16, 128])
def test_hard_inputs_in_float32(case, length):
    """Repeated keys at C = 128 make the solve as ill-conditioned as it gets (spec H 36)."""
    given = operands(np.random.default_rng(2), ("decay", "erase", "momentum"), length=length)
    given |= HARD[case](given)
    given = {name: value.astype(jnp.float32) for name, value in given.items()}
    reads, final, _ = numpy_recurrence(given, "running_prev")
    out, gradient = chunk_and_gradient(given)
    np.testing.assert_allclose(out.reads, reads, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(out.final, final, atol=1e-4, rtol=1e-4)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in gradient.values())


def test_a_chunk_of_padding_changes_nothing():
    """What padding is: nothing written, nothing erased, all kept; the chunks around it learn."""
    given = operands(np.random.default_rng(6), ("decay", "erase", "momentum"), length=12)
    chunk = slice(4, 8)
    for name, padding in {"learning_rate": 0.0, "erase": 0.0, "decay": 1.0}.items():
        given[name] = given[name].at[:, chunk].set(padding)
    given |= {name: given[name].at[:, chunk].set(0.0) for name in ("x", "error", "momentum")}
    given["initial_momentum"] = 0 * given["initial_momentum"]
    both = jax.jit(jax.value_and_grad(lambda g: jnp.sum(delta_rule(**g, chunk_size=4).final ** 2)))
    states = ("initial", "initial_momentum")
    without = {
        name: array if name in states else jnp.delete(array, np.r_[chunk], axis=1)
        for name, array in given.items()
    }
    # The padded chunk ends the momentum; so does this in the other text.
    without["momentum"] = without["momentum"].at[:, 4].set(0.0)
    given["momentum"] = given["momentum"].at[:, 8].set(0.0)
    (value, gradient), (expected, of_expected) = both(given), both(without)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name in states:
        np.testing.assert_allclose(gradient[name], of_expected[name], rtol=1e-4, atol=1e-6)


def test_shared_keys_broadcast_over_memories():
    given = operands(np.random.default_rng(3), ("decay", "erase"))
    many = jnp.stack([given["initial"], 2 * given["initial"]], axis=1)
    shared = {name: value[:, None] for name, value in given.items()} | {"initial": many}
    run = jax.jit(lambda given: delta_rule(**given, chunk_size=4))
    out = run(shared)
    for index in range(2):
        alone = run({**given, "initial": many[:, index]})
        np.testing.assert_allclose(out.reads[:, index], alone.reads, atol=1e-5)
        np.testing.assert_allclose(out.final[:, index], alone.final, atol=1e-5)


def test_states_stay_float32_under_bfloat16():
    given = operands(np.random.default_rng(4), ("decay", "erase"))
    low = {name: value.astype(jnp.bfloat16) for name, value in given.items()}
    out = delta_rule(**low, chunk_size=4)
    assert out.reads.dtype == jnp.bfloat16 and out.final.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read": "later"}, "read='later'"),
        ({"implementation": "cuda"}, "implementation='cuda'"),
        ({"chunk_size": 0}, "chunk_size=0 must be an integer, at least 1"),
        ({"initial": jnp.zeros((2, 3, 4))}, "initial has shape"),
        ({"learning_rate": jnp.zeros((2, 3))}, "learning_rate has 3 tokens where x has 11"),
        ({"initial_momentum": jnp.zeros((2, 5, 4))}, "without momentum"),
    ],
)
def test_bad_input_says_what(change, message):
    given = operands(np.random.default_rng(5), ())
    with pytest.raises(ValueError, match=message):
        delta_rule(**{**given, **change})
