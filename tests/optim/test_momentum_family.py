"""Preconditioned, delta and deep momentum against problems solved in numpy (oracles 1-3, 9-12)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestedjax import levels, optim
from tests.optim.running import draw, run

T = 6


@pytest.fixture(autouse=True)
def wide(x64):
    """Every test here is an oracle in float64."""


def descend(gradient, start, rate=0.05, steps=20_000):
    """The minimiser of a quadratic by gradient descent."""
    z = start.copy()
    for _ in range(steps):
        z = z - rate * gradient(z)
    return z


def updates_of(tx, grads, params=None):
    return np.asarray(run(tx, grads[0] if params is None else params, grads)[0])


def test_sgd_is_its_proximal_step_and_ftrl():
    """Oracle 1: argmin <W, g> + |W - W_t|^2 / (2 eta), and over all gradients from W_0."""
    w, g, eta = np.asarray(draw(3, 4)), np.asarray(draw(5, 3, 4, seed=1)), 0.3
    found = w + np.asarray(optax.sgd(eta).update(jnp.asarray(g[0]), optax.sgd(eta).init(w))[0])
    prox = descend(lambda z: g[0] + (z - w) / eta, w)
    np.testing.assert_allclose(found, prox, atol=1e-10)
    _, history, _ = run(optax.sgd(eta), jnp.asarray(w), jnp.asarray(g))
    leader = descend(lambda z: g.sum(0) + (z - w) / eta, w)
    np.testing.assert_allclose(history[-1], leader, atol=1e-10)


@pytest.mark.parametrize("mu", [0.9, 1.0, 0.0])
def test_momentum_is_the_argmin_of_its_objective_and_optax_trace(mu):
    """Oracle 2, and momentum = optax.trace exactly."""
    g, eta, m = np.asarray(draw(T, 3, 4)), 0.3, np.zeros((3, 4))
    tx = optim.preconditioned_momentum(eta, decay=mu, preconditioner="identity", weight_decay=0.0)
    found = updates_of(tx, jnp.asarray(g))
    for t in range(T):
        m = descend(lambda z, t=t, m=m: g[t] + (mu * (z - m) + (1 - mu) * z) / eta, m)
        np.testing.assert_allclose(found[t], m, atol=1e-10)
    flat = optax.chain(optax.trace(mu), optax.scale(-eta))
    np.testing.assert_allclose(found, updates_of(flat, jnp.asarray(g)), atol=1e-12)


def test_momentum_holds_the_rate_of_each_step():
    """With a schedule the printed memory and heavy ball differ: the rate is inside."""
    g, rates, m = draw(T, 3), 0.1 / jnp.arange(1.0, T + 1), 0.0
    tx = optim.preconditioned_momentum(
        lambda i: rates[i], decay=0.9, preconditioner="identity", weight_decay=0.0
    )
    found = updates_of(tx, g)
    for t in range(T):
        m = 0.9 * m - rates[t] * g[t]
        np.testing.assert_allclose(found[t], m, atol=1e-12)


def test_momentum_as_a_system_of_two_levels():
    """Oracle 3: the memory's level feeds the weights' level; the trajectory is the optimizer's."""
    grads = draw(8, 3)

    def memory(params, m, g):
        m = 0.9 * m - 0.1 * g[0]
        return m, m[None]

    def weights(params, w, m):
        w = w + m[0]
        return w, w[None]

    start = draw(3, seed=1)
    system = levels.chain(
        levels.Level("momentum", 1, lambda p: jnp.zeros(3), memory),
        levels.Level("weights", 1, lambda p: start, weights),
    )
    found, _ = levels.run(system, ((), ()), system.init(((), ())), grads)
    tx = optim.preconditioned_momentum(0.1, preconditioner="identity", weight_decay=0.0)
    np.testing.assert_allclose(found, run(tx, start, grads)[1], atol=1e-12)


def test_memory_horizon():
    """Oracle 15: the last n of many equal gradients hold 1 - mu^n of the memory."""
    table = {6: 0.4686, 7: 0.5217, 43: 0.9892, 44: 0.9903}
    tx = optim.scale_by_preconditioned_momentum(decay=0.9, preconditioner="identity")
    recent = updates_of(tx, jnp.ones((44, 1)))
    limit = 1 / (1 - 0.9)
    for n, expected in table.items():
        np.testing.assert_allclose(recent[n - 1] / limit, 1 - 0.9**n, atol=1e-12)
        assert round(1 - 0.9**n, 4) == expected


def test_inverse_curvature_solves_a_quadratic_in_one_step():
    a = np.asarray(draw(4, 4))
    h, w = a @ a.T + np.eye(4), draw(3, 4, seed=1)  # [inputs, outputs] kernels: H acts on outputs
    tx = optim.preconditioned_momentum(
        1.0,
        decay=0.0,
        preconditioner=optim.scale_by_matrix(jnp.asarray(np.linalg.inv(h))),
        weight_decay=0.0,
    )
    update, _ = tx.update(w @ h, tx.init(w), w)
    np.testing.assert_allclose(w + update, 0, atol=1e-10)


def test_diagonal_preconditioner_against_numpy():
    g, v, m = np.asarray(draw(T, 3, 2)), 0.0, 0.0
    found = updates_of(optim.preconditioned_momentum(0.1, weight_decay=0.0), jnp.asarray(g))
    for t in range(T):
        v = 0.99 * v + 0.01 * g[t] ** 2
        m = 0.9 * m - 0.1 * g[t] / (np.sqrt(v / (1 - 0.99 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(found[t], m, atol=1e-10)


def test_learned_preconditioner_against_numpy():
    g, p = np.asarray(draw(T, 4, 3)), np.eye(3)
    found = updates_of(
        optim.scale_by_learned_preconditioner(inner_learning_rate=0.7), jnp.asarray(g)
    )
    for t in range(T):
        u, _, vt = np.linalg.svd(g[t].T, full_matrices=False)
        k, v = g[t].T / np.linalg.norm(g[t]), (u @ vt) / np.linalg.norm(u @ vt)
        p = p - 0.7 * (p @ k - v) @ k.T
        np.testing.assert_allclose(found[t], (p @ g[t].T).T, atol=1e-9)


FEATURES = {
    "sign": ("sign", np.sign),
    "normalized": ("normalized", lambda g: g / (np.abs(g) + 1e-8)),
    "polynomial": (
        optim.features.polynomial((0.5, 0.2, 0.1)),
        lambda g: 0.5 * g + 0.2 * g * np.abs(g) + 0.1 * g**3,
    ),
    "spectral": (
        optim.features.spectral((0.5, 0.2, 0.1)),
        lambda g: 0.5 * g + 0.2 * g @ g.T @ g + 0.1 * g @ g.T @ g @ g.T @ g,
    ),
    # as many random features as inputs, the identity on them: the plain momentum
    "random": (optim.features.random_features(4, function=lambda x: x), lambda g: g),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name):
    """phi = identity is preconditioned momentum; the others what they say."""
    features, phi = FEATURES[name]
    g, m = np.asarray(draw(3, 4, 3)), 0.0
    tx = optim.preconditioned_momentum(
        0.1, preconditioner="identity", features=features, weight_decay=0.0
    )
    found = updates_of(tx, jnp.asarray(g))
    for t in range(3):
        m = 0.9 * m - 0.1 * phi(g[t])
        np.testing.assert_allclose(found[t], m, atol=1e-10)


# ---- delta momentum

DELTA = {"decay": 0.9, "erase": 0.4}


def test_delta_gradient_by_finite_differences():
    """Oracle 9: one step of size zeta on 1/2 |m g^T + P|_F^2 erases by g^T g and writes -P g."""
    do, di = 3, 4
    g, m, p = (np.asarray(draw(*s, seed=i)) for i, s in enumerate([(do, di), (do, di), (do, do)]))
    loss = lambda m: np.sum((m @ g.T + p) ** 2) / 2  # noqa: E731
    slope = np.zeros((do, di))
    for i, j in np.ndindex(do, di):
        nudge = np.zeros((do, di))
        nudge[i, j] = 1e-6
        slope[i, j] = (loss(m + nudge) - loss(m - nudge)) / 2e-6
    tx = optim.scale_by_delta_momentum(
        decay=1.0,
        erase=0.4,
        normalize_key=False,
        preconditioner=optax.chain(optim.scale_by_matrix(jnp.asarray(p)), optax.scale(-0.4)),
    )
    state = tx.init(jnp.zeros((di, do)))._replace(trace=jnp.asarray(m.T))
    found, _ = tx.update(jnp.asarray(g.T), state)
    np.testing.assert_allclose(found.T, m - 0.4 * slope, atol=1e-8)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (2, 3, 4)])
def test_implicit_delta_is_stationary(shape):
    """Oracle 9: the gradient of its own problem is 0 at the solution, on either side."""
    zeta, mu = 0.3, 0.9
    m, g, p = draw(*shape, seed=1), draw(*shape, seed=2), draw(shape[-1], shape[-1], seed=3)
    tx = optim.scale_by_delta_momentum(
        decay=mu,
        erase=zeta,
        implicit=True,
        normalize_key=False,
        preconditioner=optax.chain(optim.scale_by_matrix(p), optax.scale(-zeta)),
    )
    new, _ = tx.update(g, tx.init(g)._replace(trace=m))
    new, m, g = (np.asarray(a.mT) for a in (new, m, g))  # [outputs, inputs]
    slope = (new @ g.mT + np.asarray(p)) @ g + (new - mu * m) / zeta
    np.testing.assert_allclose(slope, 0, atol=1e-10)


def test_no_erasing_is_preconditioned_momentum():
    """Oracle 9: zeta = 0 with any P, and with P = 1 plain momentum."""
    grads = draw(T, 4, 3)
    for name in ("diagonal", "identity"):
        ours = optim.delta_momentum(0.1, erase=0.0, preconditioner=name)
        plain = optim.preconditioned_momentum(0.1, preconditioner=name)
        np.testing.assert_allclose(updates_of(ours, grads), updates_of(plain, grads), atol=1e-12)


def test_orthogonal_gradients_keep_each_other_and_repeated_ones_erase():
    """B4: a memory along g1 decays by mu under g2, and by mu - zeta under g1 again."""
    g1, g2 = np.zeros((3, 2)), np.zeros((3, 2))
    g1[0, 0], g2[1, 1] = 2.0, 3.0  # [inputs, outputs]: other inputs, so g1 g2^T = 0
    tx = optim.scale_by_delta_momentum(**DELTA)
    after = updates_of(tx, jnp.asarray(np.stack([g1, g2])))[1]
    np.testing.assert_allclose(after, 0.9 * g1 + g2, atol=1e-10)
    twice = updates_of(tx, jnp.asarray(np.stack([g1, g1])))[1]
    np.testing.assert_allclose(twice, (0.9 - 0.4) * g1 + g1, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_delta_against_numpy(shape):
    g, m = np.asarray(draw(T, *shape)).mT, 0.0
    found = updates_of(optim.scale_by_delta_momentum(**DELTA), jnp.asarray(g.mT))
    for t in range(T):
        k = g[t] / np.linalg.norm(g[t])
        m = m @ (0.9 * np.eye(shape[0]) - 0.4 * k.T @ k) + g[t] if t else g[t]
        np.testing.assert_allclose(found[t].T, m, atol=1e-10)


def test_rank_one_key_is_the_gradient_of_rank_one():
    g = draw(T, 4)[:, :, None] * draw(T, 3, seed=1)[:, None, :]
    full = optim.scale_by_delta_momentum(**DELTA)
    top = optim.scale_by_delta_momentum(**DELTA, key="rank1")
    np.testing.assert_allclose(updates_of(top, g), updates_of(full, g), atol=1e-10)
    g = draw(2, 4, 3)
    u, s, vt = np.linalg.svd(np.asarray(g[1]).T)
    expected = 0.9 * np.asarray(g[0]).T
    share = (s[0] / np.linalg.norm(s)) ** 2
    expected = expected - 0.4 * share * np.outer(np.asarray(g[0]).T @ vt[0], vt[0])
    found = updates_of(top, g)[1] - np.asarray(g[1])
    np.testing.assert_allclose(found.T, expected, atol=1e-3)  # eight power steps


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("vector_as", ["row", "col", "elementwise"])
def test_vectors(vector_as, implicit):
    g, m, mu, zeta = np.asarray(draw(3, 4)), np.zeros(4), 0.9, 0.4
    tx = optim.scale_by_delta_momentum(**DELTA, vector_as=vector_as, implicit=implicit)
    found = updates_of(tx, jnp.asarray(g))
    for t in range(3):
        k = g[t] / np.linalg.norm(g[t])
        b = mu * m + g[t]
        if implicit:
            m = {
                "row": b - zeta * (b @ k) / (1 + zeta * k @ k) * k,
                "col": b / (1 + zeta * k @ k),
                "elementwise": b / (1 + zeta * k**2),
            }[vector_as]
        else:
            m = {
                "row": mu * m - zeta * (m @ k) * k,
                "col": m * (mu - zeta * k @ k),
                "elementwise": m * (mu - zeta * k**2),
            }[vector_as] + g[t]
        np.testing.assert_allclose(found[t], m, atol=1e-10)


# ---- deep momentum


def test_keyless_deep_momentum_is_momentum():
    """Oracle 10: phi itself as output, dot product with the gradient as value."""
    grads = draw(T, 4, 3)
    tx = optim.scale_by_deep_momentum(
        architecture="keyless",
        objective="dot",
        normalize_key=False,
        rescale=False,
        inner_learning_rate=1.0,
    )
    np.testing.assert_allclose(
        updates_of(tx, grads), updates_of(optax.trace(0.9), grads), atol=1e-12
    )


def test_linear_deep_momentum_is_least_squares_descent():
    """B5: phi descends 1/2 mean |W k - v|^2 over the rows, from zero."""
    g, phi = np.asarray(draw(T, 4, 3)), np.zeros((4, 4))
    tx = optim.scale_by_deep_momentum(architecture="linear", rescale=False, inner_learning_rate=0.5)
    found = updates_of(tx, jnp.asarray(g))
    for t in range(T):
        k = g[t].T / np.sqrt(np.mean(g[t] ** 2))  # rows: 3 outputs of 4 inputs
        phi = 0.9 * phi - 0.5 / 4 * (k @ phi.T + k).T @ k / 3
        np.testing.assert_allclose(found[t].T, -k @ phi.T, atol=1e-10)


@pytest.mark.parametrize(
    ("value", "objective"), [("neg_grad", "l2"), ("ones", "dot"), ("ema", "l2")]
)
def test_mlp_deep_momentum_against_autodiff_row_by_row(value, objective):
    """The inner loss written out a row at a time, decayed towards where the network started."""
    g = draw(3, 2, 4, 3)  # a stack of two matrices
    tx = optim.scale_by_deep_momentum(
        value=value, objective=objective, rescale=False, width=5, decay_to="start"
    )
    found = updates_of(tx, g)
    start = jax.tree.map(lambda w: w[0], tx.init(g[0]).network)
    for which in range(2):
        phi, average = start, jnp.zeros((3, 4))
        for t in range(3):
            u = g[t, which].T
            k = u / jnp.sqrt(jnp.mean(u**2))
            average = 0.9 * average - 0.1 * k
            goal = {"neg_grad": -k, "ones": jnp.ones_like(k), "ema": average}[value]

            def loss(phi, k=k, goal=goal):
                total = 0.0
                for row in range(3):
                    h = jax.nn.gelu(phi["first"] @ k[row])
                    out = phi["second"] @ h
                    error = out - goal[row]
                    total += error @ error / 2 if objective == "l2" else -out @ goal[row]
                return total / 3

            slope = jax.grad(loss)(phi)
            phi = jax.tree.map(lambda w, w0, s: w0 + 0.9 * (w - w0) - 0.125 * s, phi, start, slope)
            out = jnp.stack([phi["second"] @ jax.nn.gelu(phi["first"] @ row) for row in k])
            np.testing.assert_allclose(found[t, which].T, -out, atol=1e-10)


def test_an_mlp_that_decays_to_zero_never_comes_back_and_one_that_decays_to_its_start_does():
    """Departure 4: after a quiet time the printed form has no gradient in either layer."""
    grads = jnp.concatenate([jnp.zeros((900, 4, 3)), jnp.broadcast_to(draw(4, 3), (20, 4, 3))])
    dead, alive = (
        optim.scale_by_deep_momentum(decay_to=to, rescale=False) for to in ("zero", "start")
    )
    assert np.abs(updates_of(dead, grads)[-1]).max() < 1e-12
    assert np.abs(updates_of(alive, grads)[-1]).max() > 1e-2


# ---- Adam as the optimal elementwise memory


def test_optimal_elementwise_memory():
    """Oracle 12: (sum g) P / (sum g^2 + lam) minimises sum |m g_i - P|^2 + lam |m|^2."""
    g, lam = np.asarray(draw(9, 4)), 0.2
    h = (g**2).sum(0)
    for target in (h, np.sqrt(h)):
        best = descend(lambda m, p=target: 2 * ((m * g - p) * g).sum(0) + 2 * lam * m, np.ones(4))
        np.testing.assert_allclose(best, g.sum(0) * target / (h + lam), atol=1e-10)
    np.testing.assert_allclose(g.sum(0) * h / h, g.sum(0))  # P = sum g^2, lam = 0: momentum


def test_adam_with_equal_betas_is_the_weighted_optimum():
    """Oracle 12: with weights (1 - b) b^(t - i) and P = sqrt(sum w g^2), lam = 0."""
    g, b = draw(9, 4), 0.9
    w = (1 - b) * b ** np.arange(8, -1, -1)[:, None]
    h = (w * np.asarray(g) ** 2).sum(0)
    tx = optim.scale_by_m3(
        b1=b,
        b2=b,
        slow_weight=0.0,
        orthogonalize="none",
        rms_rescale=None,
        bias_correction="none",
        eps=0.0,
    )
    found = updates_of(tx, g)[-1]
    np.testing.assert_allclose(found, (w * np.asarray(g)).sum(0) / np.sqrt(h), atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: optim.delta_momentum(0.1, erase=0.95),
            "0.95 must be at least 0 and at most 0.9",
        ),
        (lambda: optim.delta_momentum(0.1, key="x"), "key='x' is not one of gradient, rank1"),
        (lambda: optim.preconditioned_momentum(0.1, preconditioner="x"), "'x' is not one of id"),
        (lambda: optim.preconditioned_momentum(0.1, features="x"), "features='x' is not one of"),
        (lambda: optim.deep_momentum(0.1, architecture="x"), "'x' is not one of mlp, linear"),
        (
            lambda: optim.deep_momentum(0.1, max_inputs=2).init({"w": jnp.ones((4, 3))}),
            "'w' has 4 inputs, more than max_inputs=2",
        ),
    ],
)
def test_mistakes_are_named(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()
