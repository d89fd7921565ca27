"""Oracles 17-28, 32, 35, 39 and 55 of the specification, each in numpy float64 beside the package.

Every case of this module that needs the package is compiled in one go (`results`), because the
compiler's time is all that these tests cost.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax import levels
from nestedjax import memory as nm

T, D = 12, 4
RNG = np.random.default_rng(0)
KEYS = RNG.normal(size=(T, D))
KEYS /= np.linalg.norm(KEYS, axis=1, keepdims=True)
VALUES, QUERIES = RNG.normal(size=(2, T, D))
LEARNING_RATE, DECAY = RNG.uniform(0.1, 0.6, T), RNG.uniform(0.8, 1.0, T)
M0 = RNG.normal(size=(D, D))
ONES = np.ones(T)
LONG_KEYS = KEYS * RNG.uniform(0.5, 2.0, (T, 1))
EYE = np.eye(D)


def tokens(keys=KEYS, values=VALUES, queries=QUERIES, learning_rate=LEARNING_RATE, decay=None):
    fields = {
        "keys": keys,
        "values": values,
        "queries": queries,
        "learning_rate": learning_rate,
        "decay": decay,
    }
    return {k: v for k, v in fields.items() if v is not None}


def product(objective, retention, rule, chunk, read="running", size=D):
    return nm.associative_memory(
        nm.matrix(size, size), objective, retention, rule, chunk_size=chunk, read=read
    )


def delta(decay, erase, write, read="running", start=M0, keys=KEYS, values=VALUES):
    """Reads and final memory of M = M(decay I - erase k k^T) + write v k^T."""
    memory, reads = start, []
    for t in range(len(keys)):
        before = memory
        memory = memory @ (decay[t] * EYE - erase[t] * np.outer(keys[t], keys[t]))
        memory = memory + write[t] * np.outer(values[t], keys[t])
        reads.append((memory if read == "running" else before) @ QUERIES[t])
    return np.array(reads), memory


def phi(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


GATED = tokens(decay=DECAY)
ONE = {k: v[:1] for k, v in tokens(learning_rate=ONES, decay=ONES).items()}
FLIP = tokens(keys=np.tile(KEYS[:1], (T, 1)), values=np.zeros((T, D)), learning_rate=2 * ONES)
ETA, STRENGTH = 0.5, 3.0
PROXIMAL_DECAY = STRENGTH / (STRENGTH + ETA)
PROXIMAL = ONE | {
    "learning_rate": np.array([ETA * PROXIMAL_DECAY]),
    "decay": np.array([PROXIMAL_DECAY]),
}
LAST = ONES * np.where(np.arange(T) == T - 1, 0.0, 1.0)

CASES = {
    "linear attention": (nm.linear_attention(D, D, chunk_size=4), M0, tokens(learning_rate=ONES)),
    "normalised": (
        nm.normalised_linear_attention(
            D, D, chunk_size=4, feature_map=nm.elu_plus_one, epsilon=0.0
        ),
        np.zeros((D + 1, D)),
        tokens(learning_rate=ONES),
    ),
    "dgd dot": (nm.hope_dot(D, D, chunk_size=4, read="running"), M0, GATED),
    "gd l2": (product(nm.l2(), nm.decay(), nm.gradient(), 1), M0, GATED),
    "delta_net": (nm.delta_net(D, D, chunk_size=4), M0, tokens()),
    "dgd dot decay 1": (nm.hope_dot(D, D, chunk_size=6, read="running"), M0, tokens(decay=ONES)),
    "gated_delta_net": (nm.gated_delta_net(D, D, chunk_size=4), M0, GATED),
    "one gdn": (nm.gated_delta_net(D, D, chunk_size=1), M0, {k: v[:1] for k, v in GATED.items()}),
    "one hope": (nm.hope_dot(D, D, chunk_size=1), M0, {k: v[:1] for k, v in GATED.items()}),
    "hope_l2": (nm.hope_l2(D, D, chunk_size=1, read="running"), M0, GATED),
    "longhorn": (nm.longhorn(D, D, chunk_size=4), M0, tokens(keys=LONG_KEYS)),
    "oja": (nm.oja_memory(D, D, chunk_size=1), M0, ONE),
    "kl": (product(nm.dot(), nm.kl(2.0), nm.gradient(), 1), M0, PROXIMAL),
    "elastic": (product(nm.dot(), nm.elastic_net(0.6), nm.gradient(), 1), M0, PROXIMAL),
    "lq": (product(nm.dot(), nm.lq(1.5), nm.gradient(), 1, "anchor"), M0, tokens(decay=ONES)),
    "l2 decay": (product(nm.l2(), nm.decay(), nm.gradient(), 4), M0, GATED),
    "lp 2": (product(nm.lp(2.0), nm.decay(), nm.gradient(), 4), M0, GATED),
    "huber inf": (product(nm.huber(1e9), nm.decay(), nm.gradient(), 4), M0, GATED),
    "huber_norm inf": (product(nm.huber_norm(1e9), nm.decay(), nm.gradient(), 4), M0, GATED),
    "lq 2": (product(nm.l2(), nm.lq(2.0), nm.gradient(), 4), M0, GATED),
    "omega 1": (product(nm.l2(), nm.decay(), nm.omega(1), 4), M0, GATED),
    "omega 3": (nm.omega_memory(nm.matrix(D, D), window=3, chunk_size=1), M0, GATED),
    "ridge": (
        product(nm.l2(), nm.decay(), nm.implicit_omega(T), 4),
        M0,
        tokens(decay=LAST),
    ),
    "ttt": (
        product(nm.l2(), nm.none(), nm.gradient(), 4),
        M0,
        tokens(learning_rate=0.3 * LEARNING_RATE),
    ),
    "ttt full": (product(nm.l2(), nm.none(), nm.gradient(), T), np.zeros((D, D)), tokens()),
    "recall": (
        nm.delta_net(D, D, chunk_size=4),
        M0,
        tokens(keys=np.tile(EYE, (3, 1)), learning_rate=ONES),
    ),
    "R1": (product(nm.l2(), nm.decay(), nm.delta(), 4), M0, GATED),
    "R2": (product(nm.l2(), nm.decay(), nm.input_delta(), 4), M0, GATED),
    "R4 token": (product(nm.l2(), nm.decay(), nm.functional_delta(), 1), M0, GATED),
    "R4 chunk": (product(nm.l2(), nm.decay(), nm.functional_delta(), 4), M0, GATED),
    "flip": (nm.delta_net(D, D, chunk_size=4), M0, FLIP),
    "no flip": (nm.delta_net(D, D, chunk_size=4), M0, FLIP | {"learning_rate": 0.9 * ONES}),
}
for chunk in (1, 4, T):
    CASES[f"retention {chunk}"] = (
        nm.retention_memory(D, D, chunk_size=chunk),
        np.zeros((D, D)),
        tokens(learning_rate=ONES, decay=DECAY),
    )
    CASES[f"hope_dot {chunk}"] = (nm.hope_dot(D, D, chunk_size=chunk), M0, GATED)
    CASES[f"hope_l2 {chunk}"] = (nm.hope_l2(D, D, chunk_size=chunk), M0, GATED)


@pytest.fixture(scope="module")
def results():
    """(reads, final memory) of every case."""
    with jax.enable_x64(True):

        @jax.jit
        def run_all(given):
            found = {}
            for name, (start, x) in given.items():
                level = CASES[name][0]
                y, end = levels.run(level, (start,), level.init((start,)), nm.Tokens(**x))
                found[name] = y, end.state.weights[0]
            return found

        given = {
            name: (jnp.asarray(start), {k: jnp.asarray(v) for k, v in x.items()})
            for name, (_, start, x) in CASES.items()
        }
        return jax.tree.map(np.asarray, run_all(given))


def assert_same(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_linear_attention_is_gradient_descent_on_the_dot_product(results):
    """Oracle 17: learning rate 1; and with feature map and normaliser it is kernel attention."""
    assert_same(results["linear attention"], delta(ONES, 0 * ONES, ONES))
    scores = np.tril(phi(QUERIES) @ phi(KEYS).T)
    expected = scores @ VALUES / scores.sum(1, keepdims=True)
    np.testing.assert_allclose(results["normalised"][0], expected, atol=1e-10)


def test_dgd_on_dot_is_gd_on_l2_is_the_delta_rule(results):
    """Oracle 18: with decay 1 it is DeltaNet, with nothing erased RetNet or GLA."""
    expected = delta(DECAY, LEARNING_RATE, LEARNING_RATE)
    assert_same(results["dgd dot"], expected)
    assert_same(results["gd l2"], expected)
    assert_same(results["delta_net"], delta(ONES, LEARNING_RATE, LEARNING_RATE))
    assert_same(results["dgd dot decay 1"], results["delta_net"])
    retention = delta(DECAY, 0 * ONES, ONES, start=np.zeros((D, D)))
    assert_same(results["retention 4"], retention)


def test_gated_delta_net_is_not_hope(results):
    """Oracle 19: they differ by (1 - a) b M k k^T, hence not at decay 1."""
    assert_same(results["gated_delta_net"], delta(DECAY, DECAY * LEARNING_RATE, LEARNING_RATE))
    difference = results["one gdn"][1] - results["one hope"][1]
    expected = (1 - DECAY[0]) * LEARNING_RATE[0] * np.outer(M0 @ KEYS[0], KEYS[0])
    np.testing.assert_allclose(difference, expected, atol=1e-12)
    assert np.abs(expected).max() > 1e-3


def test_dgd_on_l2_erases_twice(results):
    """C2: M = a M - 2 b M k k^T + b v k^T, whose fixed point is v / 2."""
    assert_same(results["hope_l2"], delta(DECAY, 2 * LEARNING_RATE, LEARNING_RATE))
    memory = M0
    for _ in range(200):
        memory = memory - 0.3 * np.outer(2 * memory @ KEYS[0] - VALUES[0], KEYS[0])
    np.testing.assert_allclose(memory @ KEYS[0], VALUES[0] / 2, atol=1e-12)


def test_a_full_learning_rate_writes_exactly_and_recalls_as_many_pairs_as_keys(results):
    """Oracle 20: D orthonormal keys are all recalled; one more pair is not."""
    _, memory = results["recall"]
    np.testing.assert_allclose(memory @ EYE, VALUES[-D:].T, atol=1e-12)
    assert np.abs(memory @ EYE[0] - VALUES[-2 * D]).max() > 0.1  # overwritten


def test_longhorn_is_the_closed_form_of_dgd(results):
    """Oracle 21: argmin 1/2 |W k - v|^2 + 1/(2 eta) |W - W'|^2, by a dense inverse."""
    memory = M0
    for k, v, learning_rate in zip(LONG_KEYS, VALUES, LEARNING_RATE, strict=True):
        memory = (np.outer(v, k) + memory / learning_rate) @ np.linalg.inv(
            np.outer(k, k) + EYE / learning_rate
        )
    np.testing.assert_allclose(results["longhorn"][1], memory, atol=1e-10)


def numeric_gradient(function, at, step=1e-6):
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        moved = np.zeros_like(at)
        moved[index] = step
        gradient[index] = (function(at + moved) - function(at - moved)) / (2 * step)
    return gradient


def test_oja_descends_its_loss(results):
    """Oracle 22: -<M k, v> + 1/2 |M^T v|^2 by finite differences."""
    k, v = KEYS[0], VALUES[0]
    gradient = numeric_gradient(lambda m: -(m @ k) @ v + 0.5 * np.sum((m.T @ v) ** 2), M0)
    np.testing.assert_allclose(results["oja"][1], M0 - gradient, atol=1e-8)


def softmax(a, scale=2.0):
    e = np.exp(a - a.max(-1, keepdims=True))
    return scale * e / e.sum(-1, keepdims=True)


def test_retentions_are_stationary_points(results):
    """Oracle 23: KL on the simplex, elastic net, lq; g is the gradient of -<M k, v>."""
    gradient = -np.outer(VALUES[0], KEYS[0])
    old, new = softmax(M0), softmax(results["kl"][1])
    slope = gradient + (np.log(new / old) + 1) / ETA + (np.log(new) + 1) / STRENGTH
    np.testing.assert_allclose(slope - slope.mean(1, keepdims=True), 0, atol=1e-9)
    new = results["elastic"][1]
    slope = gradient + (new - M0) / ETA + new / STRENGTH
    assert 0 < np.sum(new == 0) < new.size
    np.testing.assert_allclose(slope[new != 0], -0.6 * np.sign(new[new != 0]), atol=1e-9)
    assert np.all(np.abs(slope[new == 0]) <= 0.6 + 1e-12)
    # lq: the gradient of 1/2 |W|_q^2 at the weights is the accumulator.
    memory, q = M0 + sum(np.outer(v, k) * r for v, k, r in zip(VALUES, KEYS, LEARNING_RATE)), 1.5  # noqa: B905
    np.testing.assert_allclose(results["lq"][1], memory, atol=1e-10)
    p = q / (q - 1)
    norm = np.sum(np.abs(M0) ** p) ** (1 / p)
    weights = np.sign(M0) * np.abs(M0) ** (p - 1) / norm ** (p - 2)
    np.testing.assert_allclose(results["lq"][0][0], weights @ QUERIES[0], atol=1e-6)
    size = np.sum(np.abs(weights) ** q) ** (1 / q)
    back = np.sign(weights) * np.abs(weights) ** (q - 1) * size ** (2 - q)
    np.testing.assert_allclose(back, M0, atol=1e-10)


@pytest.mark.parametrize("case", ["lp 2", "huber inf", "huber_norm inf", "lq 2"])
def test_special_exponents_are_the_quadratic_rule(results, case):
    """Oracle 23: p = 2, q = 2, threshold infinite."""
    assert_same(results[case], results["l2 decay"], 1e-9)
    assert np.abs(results["l2 decay"][1] - M0).max() > 0.1


def test_omega(results):
    """Oracle 24: window 1 is gradient descent, the sum is the matrix form, the whole is ridge."""
    assert_same(results["omega 1"], results["l2 decay"])
    memory = M0
    for t in range(T):
        seen = slice(max(0, t - 2), t + 1)
        keys, values, gamma = KEYS[seen].T, VALUES[seen].T, np.diag(LEARNING_RATE[seen])
        memory = memory @ (DECAY[t] * EYE - keys @ gamma @ keys.T) + values @ gamma @ keys.T
    np.testing.assert_allclose(results["omega 3"][1], memory, atol=1e-10)
    # A window over everything, with nothing kept: ridge regression of strength 1.
    gamma = np.diag(LEARNING_RATE)
    ridge = VALUES.T @ gamma @ KEYS @ np.linalg.inv(KEYS.T @ gamma @ KEYS + EYE)
    np.testing.assert_allclose(results["ridge"][1], ridge, atol=1e-10)


def test_polynomial_features_are_the_exponential(x64):
    """Oracle 25."""
    q, k = 0.5 * RNG.normal(size=(2, 5, 3))
    features = nm.polynomial(9)
    found = np.asarray(features(jnp.asarray(q))) @ np.asarray(features(jnp.asarray(k))).T
    np.testing.assert_allclose(found, np.exp(q @ k.T), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, T])
def test_retention_is_parallel_is_recurrent(results, chunk):
    """Oracle 26: (Q K^T * D) V with D the products of decays, at every chunk size."""
    decay = np.array([[np.prod(DECAY[i + 1 : t + 1]) for i in range(T)] for t in range(T)])
    expected = (np.tril(decay) * (QUERIES @ KEYS.T)) @ VALUES
    np.testing.assert_allclose(results[f"retention {chunk}"][0], expected, atol=1e-10)


def test_ttt_is_its_dual_form(results):
    """Oracle 28, for the linear model without norm and bias; one mini-batch: linear attention."""
    learning_rate, weights, explicit, dual = 0.3 * LEARNING_RATE, M0, [], []
    for first in range(0, T, 4):
        rows = slice(first, first + 4)
        keys, values, queries = KEYS[rows], VALUES[rows], QUERIES[rows]
        errors = keys @ weights.T - values
        step = np.tril(np.tile(learning_rate[rows], (4, 1)))
        dual.append(queries @ weights.T - (step * (queries @ keys.T)) @ errors)
        for t in range(4):
            seen = [learning_rate[first + i] * np.outer(errors[i], keys[i]) for i in range(t + 1)]
            explicit.append((weights - sum(seen)) @ queries[t])
        weights = weights - (learning_rate[rows, None] * errors).T @ keys
    np.testing.assert_allclose(np.concatenate(dual), explicit, atol=1e-12)
    assert_same(results["ttt"], (explicit, weights))
    attention = np.tril(QUERIES @ KEYS.T * LEARNING_RATE) @ VALUES
    np.testing.assert_allclose(results["ttt full"][0], attention, atol=1e-10)


def test_only_the_dot_objective_is_free_of_the_chunk_size(results):
    """Oracle 32."""
    for chunk in (4, T):
        assert_same(results[f"hope_dot {chunk}"], results["hope_dot 1"])
        assert np.abs(results[f"hope_l2 {chunk}"][1] - results["hope_l2 1"][1]).max() > 1e-2


def test_readings_of_dgd_agree_on_a_matrix(results):
    """Oracle 39: R1 = R2 on a linear memory; R4 = R1 at chunk size 1, not beyond."""
    assert_same(results["R1"], results["R2"])
    assert_same(results["R4 token"], delta(DECAY, 2 * LEARNING_RATE, LEARNING_RATE))
    assert np.abs(results["R4 chunk"][1] - results["R1"][1]).max() > 1e-2


def test_parity_by_hand(results):
    """Oracle 55: learning rate 2 on a constant unit key reflects the memory; below 1 none does."""
    reads, memory = results["flip"]
    along, rest = np.outer(M0 @ KEYS[0], KEYS[0]), M0 @ (EYE - np.outer(KEYS[0], KEYS[0]))
    for t in range(T):
        expected = ((-1) ** (t + 1) * along + rest) @ QUERIES[t]
        np.testing.assert_allclose(reads[t], expected, atol=1e-10)
    component = memory @ KEYS[0] @ (M0 @ KEYS[0])
    assert component > 0 and T % 2 == 0
    slow = results["no flip"][1] @ KEYS[0] @ (M0 @ KEYS[0])
    assert 0 <= slow < 1e-6  # forgotten, never of the other sign


def test_padding_is_neutral(x64):
    """Oracle 35: what stands behind the last token, or before a reset, changes nothing."""
    level = nm.titans(nm.residual_mlp((D, 5, D), output_scale=0.5), chunk_size=4)
    params = nm.residual_mlp((D, 5, D), output_scale=0.5).init(jax.random.key(0), jnp.float64)
    momentum = jnp.full(T, 0.5)
    x = nm.Tokens(*map(jnp.asarray, (KEYS, VALUES, QUERIES, LEARNING_RATE, DECAY)), momentum)
    run = jax.jit(lambda x, reset: levels.run(level, params, level.init(params), x, reset=reset))

    def padded(value):  # 6 tokens, 2 of padding, then a document of 4
        return jax.tree.map(lambda a: a.at[6:8].set(value), x)

    reset = jnp.arange(T) == 8
    (y, end), (z, other) = run(padded(0.0), reset), run(padded(3.0), reset)
    np.testing.assert_array_equal(y[:6], z[:6])
    np.testing.assert_array_equal(y[8:], z[8:])
    jax.tree.map(np.testing.assert_array_equal, end, other)
    alone, _ = run(jax.tree.map(lambda a: jnp.roll(a, -8, 0), x), jnp.zeros(T, bool))
    np.testing.assert_allclose(y[8:], alone[:4], atol=1e-12)
    # An unfinished chunk writes nothing: momentum must not move the memory either.
    cut, after = levels.run(level, params, level.init(params), jax.tree.map(lambda a: a[:6], x))
    four, whole = levels.run(level, params, level.init(params), jax.tree.map(lambda a: a[:4], x))
    np.testing.assert_allclose(cut, y[:6], atol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), after.state, whole.state
    )


def test_a_memory_is_written_once_a_chunk_and_never_between(x64):
    """floor(T / chunk) writes; between them the state is constant to the last bit."""
    level = nm.titans(nm.matrix(D, D, scale=0.5), chunk_size=4)
    x = nm.Tokens(
        *map(jnp.asarray, (KEYS, VALUES, QUERIES, LEARNING_RATE, DECAY)), jnp.full(T, 0.5)
    )
    carry, writes = levels.start(level, (jnp.asarray(M0),), x), []
    step = jax.jit(lambda carry, x: levels.run(level, (jnp.asarray(M0),), carry, x)[1])
    for t in range(T - 1):
        new = step(carry, jax.tree.map(lambda a, t=t: a[t : t + 1], x))
        same = [
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (carry.state, new.state)), strict=True)
        ]
        assert all(same) or not any(same)
        if not any(same):
            writes.append(t + 1)
        carry = new
    assert writes == [4, 8]
