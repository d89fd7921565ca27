"""Delta gradient descent, its taps, the generalised step, against solved problems (oracles 4-8)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestedjax import memory, optim
from tests.optim.running import draw

N, DI, DO, ETA = 5, 4, 3, 0.37


@pytest.fixture(autouse=True)
def wide(x64):
    """Every test here is an oracle in float64."""


def layer(n=N, stack=()):
    """A layer's weight [do, di], inputs [n, di] of norms around 3, and errors [n, do]."""
    w, x, delta = (
        draw(*stack, DO, DI),
        1.5 * draw(*stack, n, DI, seed=1),
        draw(*stack, n, DO, seed=2),
    )
    return np.asarray(w), np.asarray(x), np.asarray(delta)


def step(tx, w, x, delta):
    """One step from the gradient and the Gram matrix of a mean loss, as a tapped layer has them."""
    n = x.shape[-2]
    params = {"kernel": jnp.asarray(w.mT), "tap": jnp.zeros((*w.shape[:-2], DI, DI))}
    grads = {"kernel": jnp.asarray(x.mT @ delta / n), "tap": jnp.asarray(x.mT @ x / n)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert not np.asarray(updates["tap"]).any()
    return w + np.asarray(updates["kernel"]).mT


def minimiser(w, x, delta, eta, keep=1.0):
    """argmin 1/2 mean |Z x - u|^2 + |Z - keep W|^2 / (2 eta), u = -delta, by gradient descent."""
    z = w.copy()
    for _ in range(20_000):
        z = z - 0.05 * ((z @ x.T + delta.T) @ x / len(x) + (z - keep * w) / eta)
    return z


def test_closed_form_is_the_minimiser_for_inputs_of_any_norm():
    """Oracle 4, |x| != 1, and 7: eta -> 0 and eta -> infinity."""
    w, x, delta = layer(1)
    assert abs(np.linalg.norm(x) - 1) > 0.5
    found = step(optim.dgd(ETA), w, x, delta)
    np.testing.assert_allclose(found, minimiser(w, x, delta, ETA), atol=1e-10)
    rate = ETA / (1 + ETA * np.sum(x**2))
    printed = w @ (np.eye(DI) - rate * x.T @ x) - rate * delta.T @ x
    np.testing.assert_allclose(found, printed, atol=1e-10)
    np.testing.assert_allclose(step(optim.dgd(1e-13), w, x, delta), w, atol=1e-10)
    strong = step(optim.dgd(1e13), w, x, delta)
    np.testing.assert_allclose(strong @ x[0], -delta[0], atol=1e-9)


@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_batches(keep):
    """Oracle 5: the exact batch step is the minimiser and the Woodbury form of the n x n solve."""
    w, x, delta = layer()
    tx = optim.dgd(ETA, batch="exact", coupling="coupled", decay=keep)
    found = step(tx, w, x, delta)
    np.testing.assert_allclose(found, minimiser(w, x, delta, ETA, keep), atol=1e-10)
    eta, kept = ETA / N, keep * w  # the specification sums over the batch
    inner = np.linalg.solve(np.eye(N) + eta * x @ x.T, x @ kept.T + delta)
    np.testing.assert_allclose(found, kept - eta * inner.T @ x, atol=1e-10)


def test_decay_and_forms():
    """Oracle 6: coupled decay = keep (I - eta' x x^T); the others as printed."""
    w, x, delta = layer(1)
    c, g = x.T @ x, delta.T @ x
    rate, eye = ETA / (1 + ETA * np.trace(c)), np.eye(DI)
    expected = {
        ("implicit", "coupled"): 0.9 * w @ (eye - rate * c) - rate * g,
        ("implicit", "decoupled"): w @ (0.9 * eye - rate * c) - rate * g,
        ("explicit", "decoupled"): w @ (0.9 * eye - ETA * c) - ETA * g,
        ("neurips", "decoupled"): w @ (0.9 * eye - c) - ETA * g,
    }
    for (form, decay), new in expected.items():
        found = step(optim.dgd(ETA, form=form, coupling=decay, decay=0.9), w, x, delta)
        np.testing.assert_allclose(found, new, atol=1e-10, err_msg=form)


def test_explicit_batches_never_expand():
    """The safe rate: no direction of the weights grows, at any learning rate."""
    w, x, _ = layer()
    for eta in (0.1, 1e3):
        found = step(optim.dgd(eta), w, 10 * x, np.zeros((N, DO)))
        assert np.linalg.norm(found, 2) <= np.linalg.norm(w, 2)


def test_fixed_point_is_half_the_value():
    """Oracle 8: with loss 1/2 |W x - v|^2 on one sample, W x -> v / 2, explicit and implicit."""
    w, x, v = layer(1)
    for form, rate in (("implicit", 0.3), ("explicit", 0.05)):
        tx, z = optim.dgd(rate, form=form), w
        params = {"kernel": jnp.asarray(z.T), "tap": jnp.zeros((DI, DI))}

        def body(params, _, tx=tx):
            error = jnp.asarray(x) @ params["kernel"] - jnp.asarray(v)
            grads = {"kernel": x.T @ error, "tap": jnp.asarray(x.T @ x)}
            updates, _ = tx.update(grads, tx.init(params), params)
            return optax.apply_updates(params, updates), None

        params = jax.jit(lambda p, body=body: jax.lax.scan(body, p, None, length=600)[0])(params)
        np.testing.assert_allclose(x @ params["kernel"], v / 2, atol=1e-10)


# ---- taps


def test_taps_carry_the_gram_matrix_and_leave_the_gradients_alone():
    x, kernel = draw(2, 3, 2, 2), draw(2, 2, 3, seed=1)  # two axes contracted, [2, 3] rows
    tap = jnp.zeros((4, 4))

    def loss(x, kernel, tap, plain=False):
        if plain:
            y = jnp.tensordot(x, kernel, axes=2)
        else:
            y = optim.tapped_linear(x, kernel, tap, contracted=2)
        return jnp.mean(jnp.sin(y))

    dx, dkernel, gram = jax.jit(jax.grad(loss, (0, 1, 2)))(x, kernel, tap)
    px, pkernel = jax.grad(lambda x, k: loss(x, k, tap, True), (0, 1))(x, kernel)
    np.testing.assert_allclose(dx, px, atol=1e-12)
    np.testing.assert_allclose(dkernel, pkernel, atol=1e-12)
    flat = np.asarray(x).reshape(6, 4)
    np.testing.assert_allclose(gram, flat.T @ flat / 6, atol=1e-12)


def test_taps_are_neither_clipped_nor_counted():
    block = {"kernel": jnp.full((2, 2), 3.0), "tap": jnp.full((2, 2), 100.0)}
    grads = {"blocks": [block, block], "norm": jnp.full(2, 4.0)}
    taps = optim.taps_in(grads)
    assert taps == {"blocks": [{"kernel": False, "tap": True}] * 2, "norm": False}
    clip = optim.clip_gradients(1.0)
    found, _ = clip.update(grads, clip.init(grads))
    norm = np.sqrt(8 * 9.0 + 2 * 16.0)
    np.testing.assert_allclose(optim.gradient_norm(grads), norm, rtol=1e-6)
    np.testing.assert_allclose(found["norm"], 4 / norm, rtol=1e-6)
    np.testing.assert_array_equal(found["blocks"][1]["tap"], block["tap"])
    plain = {"w": jnp.full(2, 3.0)}
    theirs = optax.clip_by_global_norm(1.0)
    expected, _ = theirs.update(plain, theirs.init(plain))
    np.testing.assert_array_equal(clip.update(plain, clip.init(plain))[0]["w"], expected["w"])


def test_taps_under_scan_over_layers_and_vmap_over_sequences():
    x, kernels = draw(2, 3, 4), draw(5, 4, 4, seed=1)
    taps = jnp.zeros((5, 4, 4))

    def loss(taps, one_by_one):
        def forward(x, rows):
            def body(x, layer):
                y = optim.tapped_linear(x, layer[0], layer[1], rows=rows)
                return jnp.tanh(y), x

            return jax.lax.scan(jax.checkpoint(body), x, (kernels, taps))

        y, seen = jax.vmap(lambda x: forward(x, 6))(x) if one_by_one else forward(x, None)
        return jnp.mean(y), seen

    whole, seen = jax.jit(jax.grad(lambda t: loss(t, False), has_aux=True))(taps)
    split, _ = jax.jit(jax.grad(lambda t: loss(t, True), has_aux=True))(taps)
    flat = np.asarray(seen).reshape(5, 6, 4)
    np.testing.assert_allclose(whole, flat.mT @ flat / 6, atol=1e-12)
    np.testing.assert_allclose(split, whole, atol=1e-12)


def test_dense_stacked_and_embedding_layers_train_together():
    """Each weight takes its own step from what its tap saw; the rest goes to `rest`."""
    tokens = jnp.array([0, 2, 2, 1, 2])
    params = {
        "embed": {"embedding": draw(4, DI), "tap": jnp.zeros(4)},
        "blocks": {"kernel": draw(2, DI, DI, seed=1), "tap": jnp.zeros((2, DI, DI))},
        "norm": jnp.ones(DI),
    }
    target = draw(5, DI, seed=2)

    def loss(p):
        x = optim.tapped_embedding(tokens, p["embed"]["embedding"], p["embed"]["tap"])
        for i in range(2):
            x = jnp.tanh(optim.tapped_linear(x, p["blocks"]["kernel"][i], p["blocks"]["tap"][i]))
        return jnp.mean(jnp.sum((x * p["norm"][None] - target) ** 2, -1))

    grads = jax.jit(jax.grad(loss))(params)
    share = np.array([1, 1, 3, 0]) / 5
    np.testing.assert_allclose(grads["embed"]["tap"], share, atol=1e-12)
    for batch in ("explicit", "exact"):
        tx = optim.dgd(0.3, batch=batch, rest=optax.sgd(0.5))
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        np.testing.assert_allclose(updates["norm"], -0.5 * grads["norm"], atol=1e-12)
        for i in range(2):
            w, g, c = (
                np.asarray(t)
                for t in (
                    params["blocks"]["kernel"][i].T,
                    grads["blocks"]["kernel"][i].T,
                    grads["blocks"]["tap"][i],
                )
            )
            rate = 0.3 / (1 + 0.3 * np.trace(c))
            new = w - rate * (w @ c + g)
            if batch == "exact":
                new = (w - 0.3 * g) @ np.linalg.inv(np.eye(DI) + 0.3 * c)
            found = w + np.asarray(updates["blocks"]["kernel"][i]).T
            np.testing.assert_allclose(found, new, atol=1e-10)
        table, g = (np.asarray(t["embed"]["embedding"]) for t in (params, grads))
        new = table - 0.3 / 1.3 * (share[:, None] * table + g)
        if batch == "exact":
            new = (table - 0.3 * g) / (1 + 0.3 * share[:, None])
        np.testing.assert_allclose(
            table + np.asarray(updates["embed"]["embedding"]), new, atol=1e-10
        )


def test_mean_of_rank_one_steps():
    w, x, delta = layer()
    params = {"kernel": jnp.asarray(w.T), "tap": jnp.zeros((DI, DI))}

    def loss(p):  # a mean over rows whose derivative by the outputs is delta / n
        y = optim.tapped_linear(jnp.asarray(x), p["kernel"], p["tap"], rank1_learning_rate=ETA)
        return jnp.sum(y * delta) / N

    tx = optim.dgd(ETA, batch="mean_of_rank1")
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    single = [minimiser(w, x[i : i + 1], delta[i : i + 1], ETA) for i in range(N)]
    np.testing.assert_allclose(w + updates["kernel"].T, np.mean(single, 0), atol=1e-10)


# ---- GGD


def ggd_step(tx, w, x, delta):
    """One step; inputs and errors as `recorded_linear` gives them."""
    params = {"w": jnp.asarray(w.T)}

    def loss(params, record):
        return jnp.sum(optim.recorded_linear(jnp.asarray(x), params["w"], record) * delta) / len(x)

    record = jnp.zeros_like(x), jnp.zeros_like(delta)
    grads, (inputs, errors) = jax.grad(loss, (0, 1))(params, record)
    np.testing.assert_allclose(inputs, x)
    np.testing.assert_allclose(errors, delta / len(x))
    extra = {"inputs": {"w": inputs}, "errors": {"w": errors}}
    updates, _ = tx.update(grads, tx.init(params), params, **extra)
    return w + np.asarray(updates["w"]).T


def test_points_of_the_registry():
    w, x, delta = layer()
    g = delta.T @ x / N
    np.testing.assert_allclose(ggd_step(optim.ggd(ETA), w, x, delta), w - ETA * g, atol=1e-12)
    decayed = ggd_step(optim.ggd(ETA, retain="decay", decay=0.9), w, x, delta)
    np.testing.assert_allclose(decayed, 0.9 * w - ETA * g, atol=1e-12)
    exact = ggd_step(optim.ggd(ETA, objective="l2", solver="closed_form"), w, x, delta)
    dgd = step(optim.dgd(ETA, batch="exact"), w, x, delta)
    np.testing.assert_allclose(exact, dgd, atol=1e-10)
    one = ggd_step(optim.ggd(0.05, objective="l2"), w, x, delta)
    explicit = step(optim.dgd(0.05, form="explicit"), w, x, delta)
    np.testing.assert_allclose(one, explicit, atol=1e-10)


@pytest.mark.parametrize("objective", [memory.l2(), memory.huber(0.7), memory.lp(3.0)])
@pytest.mark.parametrize("solver", ["one_gd_step", "n_gd_steps"])
def test_any_objective_by_finite_differences(objective, solver):
    """One step follows the objective's gradient; many steps end where the problem's is 0."""
    w, x, delta = layer()
    keep, eta = 0.9, 0.02
    tx = optim.ggd(
        eta,
        objective=objective,
        retain="decay",
        decay=keep,
        solver=solver,
        inner_steps=300,
        inner_learning_rate=0.3,
    )
    new = ggd_step(tx, w, x, delta)
    many = solver == "n_gd_steps"

    def problem(z):
        losses = objective.loss(jnp.asarray(x @ z.T), jnp.asarray(-delta), None)
        value = float(jnp.mean(losses))
        return value + (np.sum((z - keep * w) ** 2) / (2 * eta) if many else 0)

    at, slope = (new if many else w), np.zeros_like(w)
    for i, j in np.ndindex(*w.shape):
        nudge = np.zeros_like(w)
        nudge[i, j] = 1e-6
        slope[i, j] = (problem(at + nudge) - problem(at - nudge)) / 2e-6
    if many:
        np.testing.assert_allclose(slope, 0, atol=1e-5)
    else:
        np.testing.assert_allclose(new, keep * w - eta * slope, atol=1e-8)


def test_closed_form_is_the_limit_of_many_steps():
    """B10's oracle."""
    w, x, delta = layer()
    both = [
        ggd_step(
            optim.ggd(ETA, objective="l2", solver=s, inner_steps=2000, inner_learning_rate=0.1),
            w,
            x,
            delta,
        )
        for s in ("closed_form", "n_gd_steps")
    ]
    np.testing.assert_allclose(*both, atol=1e-10)


def test_kl_is_exponentiated_gradient_over_several_steps():
    w = np.asarray(jax.nn.softmax(draw(2, DO, DI), axis=-1))  # rows over inputs; a stack of two
    grads = draw(3, 2, DI, DO, seed=1)
    tx, params = optim.ggd(ETA, retain="kl"), jnp.asarray(w.mT)
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = params + updates
        w = w * np.exp(-ETA * np.asarray(g.mT))
        w = w / w.sum(-1, keepdims=True)
        np.testing.assert_allclose(params.mT, w, atol=1e-10)


def test_generalised_momentum():
    """GM with (dot, decay) is momentum; with a Huber objective its inputs are clipped."""
    g = draw(4, 3, 2)
    tx = optim.scale_by_gm()
    state, trace, m = tx.init(g[0]), optax.trace(0.9), 0.0
    other = trace.init(g[0])
    for one in g:
        found, state = tx.update(one, state)
        expected, other = trace.update(one, other)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    tx = optim.scale_by_gm(inner_learning_rate=0.5, objective=memory.huber(0.3))
    state = tx.init(g[0])
    for one in g:
        found, state = tx.update(one, state)
        m = 0.9 * m - 0.5 * np.clip(m + np.asarray(one), -0.3, 0.3)
        np.testing.assert_allclose(found, -m, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.dgd(0.1).init({"w": jnp.ones((2, 2))}), "no parameter called 'tap'"),
        (lambda: optim.dgd(0.1).init({"tap": jnp.ones((2, 2))}), "'tap' needs one of"),
        (lambda: optim.ggd(0.1, objective="l1"), "objective='l1' is not one of dot, l2"),
        (lambda: optim.ggd(0.1, objective=memory.huber()), "'huber' needs thresholds"),
        (lambda: optim.ggd(0.1, retain=memory.lq(3.0)).init(jnp.ones((2, 2))), "no way from wei"),
        (
            lambda: optim.ggd(0.1, objective="l2", retain="kl", solver="closed_form"),
            "no closed form of objective 'l2' with retain='kl'",
        ),
        (lambda: optim.ggd(0.1, retain="kl", solver="n_gd_steps"), "knows none and decay"),
        (lambda: optim.scale_by_gm(retain="kl"), "one sign"),
        (
            lambda: optim.tapped_linear(jnp.ones((1, 2)), jnp.ones((2, 2)), jnp.ones((3, 3))),
            r"do not fit: give \[2, 2\]",
        ),
        (
            lambda: optim.ggd(0.1, objective="l2").update(
                {"w": jnp.ones((2, 2))},
                optim.GGDState(jnp.zeros((), jnp.int32), ()),
                {"w": jnp.ones((2, 2))},
            ),
            "'l2' needs inputs= and errors= of 'w'",
        ),
    ],
)
def test_mistakes_are_named(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()
