"""Laws that every defined combination of the menus keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax import levels
from nestedjax import memory as nm
from tests.memory import numpy_loop, points
from tests.vmaps import check_vmaps

READS = ("running_prev", "running", "anchor")
LENGTH, CHUNK = 8, 4


def names_of(point):
    return "-".join(point)


def run(level, params, x):
    return levels.run(level, params, level.init(params), x)


def close(a, b, tolerance):
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b
    )


every_point = pytest.mark.parametrize("names", points.POINTS, ids=names_of)
core_points = pytest.mark.parametrize("names", points.CORE, ids=names_of)


def test_the_table_holds_every_menu_entry():
    for menu, column in zip(
        (points.ARCHITECTURES, points.OBJECTIVES, points.RETENTIONS, points.RULES),
        zip(*points.POINTS, strict=True),
        strict=True,
    ):
        assert set(menu) == set(column)


@every_point
def test_every_execution_is_the_token_recurrence(names, x64):
    """Oracles 30 and 31: chunks, chunks of one token and the reference against a numpy loop."""
    params = points.params(names, jnp.float64)
    x = points.tokens(names, LENGTH, np.float64)
    cases = {(read, CHUNK, "xla"): None for read in READS}
    cases |= {("running", 1, "xla"): None, ("running_prev", CHUNK, "reference"): None}

    @jax.jit
    def run_all(params, x):
        return [
            run(points.level(names, chunk, read=read, implementation=how), params, x)
            for read, chunk, how in cases
        ]

    tolerance = 1e-5 if names[2] == "lq" else 1e-10  # the package smooths |A|^(1/3) near A = 0
    for (read, chunk, _), (y, end) in zip(cases, run_all(params, x), strict=True):
        reads, weights, momenta = numpy_loop.run(names, params, x, chunk)
        close(y, reads[read], tolerance)
        close(list(end.state.weights), weights, tolerance)
        if end.state.momentum is not None:
            close(list(end.state.momentum), momenta, tolerance)


@core_points
def test_chunked_is_the_token_recurrence_in_float32(names):
    params, x = points.params(names), points.tokens(names, LENGTH)
    chunked, reference = (
        run(points.level(names, CHUNK, implementation=implementation), params, x)
        for implementation in ("xla", "reference")
    )
    close(chunked, reference, 1e-5)


@core_points
def test_one_call_is_any_split(names, x64):
    params = points.params(names, jnp.float64)
    x = points.tokens(names, 11, np.float64)
    level = points.level(names, CHUNK)
    whole, end = run(level, params, x)
    assert int(end.position) == 11
    carry = levels.start(level, params, x)
    step = jax.jit(lambda carry, piece: levels.run(level, params, carry, piece))
    pieces = []
    for begin, stop in ((0, 3), (3, 8), (8, 11)):
        y, carry = step(carry, jax.tree.map(lambda a, b=begin, s=stop: a[b:s], x))
        pieces.append(y)
    close(jnp.concatenate(pieces), whole, 1e-10)
    close(carry, end, 1e-10)


@core_points
def test_causal_to_the_last_bit(names):
    params, x = points.params(names), points.tokens(names, LENGTH)
    level, at = points.level(names, CHUNK, read="running"), 5
    other = points.tokens(names, LENGTH, seed=7)
    changed = jax.tree.map(lambda a, b: jnp.concatenate([a[:at], b[at:]]), x, other)
    before, after = (run(level, params, tokens)[0] for tokens in (x, changed))
    np.testing.assert_array_equal(before[:at], after[:at])
    assert np.all(np.any(before[at:] != after[at:], axis=-1))


@core_points
def test_running_prev_does_not_see_its_own_write(names):
    params, x = points.params(names), points.tokens(names, LENGTH)
    level = points.level(names, CHUNK, read="running_prev")
    changed = x._replace(values=x.values.at[5].add(1.0))
    before, after = (run(level, params, tokens)[0] for tokens in (x, changed))
    np.testing.assert_array_equal(before[:6], after[:6])
    assert np.any(before[6:] != after[6:])


@core_points
def test_a_batch_is_isolated_to_the_last_bit(names):
    params, level = points.params(names), points.level(names, CHUNK)
    batch = [points.tokens(names, LENGTH, seed=seed) for seed in (1, 2, 3)]
    run_batch = jax.jit(jax.vmap(lambda x: run(level, params, x)))
    y, end = run_batch(jax.tree.map(lambda *a: jnp.stack(a), *batch))
    batch[1] = points.tokens(names, LENGTH, seed=9)
    other_y, other_end = run_batch(jax.tree.map(lambda *a: jnp.stack(a), *batch))
    for i in (0, 2):
        np.testing.assert_array_equal(y[i], other_y[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[i]), end, other_end)
    assert np.any(y[1] != other_y[1])


@core_points
def test_state_structure_and_dtypes_are_stable(names):
    level = points.level(names, CHUNK)
    params = points.params(names, jnp.bfloat16)
    x = points.tokens(names, LENGTH)._replace(
        queries=points.tokens(names, LENGTH).queries.astype(jnp.bfloat16)
    )
    state = level.init(params)
    y, end = run(level, params, x)
    assert jax.tree.structure(end.state) == jax.tree.structure(state)
    described = [[(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in (end.state, state)]
    assert described[0] == described[1]
    assert all(dtype == jnp.float32 for _, dtype in described[0])
    assert y.shape == (LENGTH, points.DIM) and y.dtype == jnp.bfloat16


@every_point
def test_learning_rate_zero_and_decay_one_leave_the_memory_alone(names):
    """Oracle 16, for rules without an own momentum to spend."""
    params, x = points.params(names), points.tokens(names, LENGTH)
    ones = None if x.decay is None else jnp.ones(LENGTH)
    level = points.level(names, CHUNK)
    y, end = run(level, params, x._replace(learning_rate=jnp.zeros(LENGTH), decay=ones))
    close(end.state.weights, level.init(params).weights, 1e-6)
    architecture, _, retention, _ = points.entries(names)
    weights = params if retention.link is None else tuple(map(retention.link, params))
    close(y, architecture.apply(weights, x.queries), 1e-5)


@pytest.mark.parametrize(
    "names",
    dict.fromkeys([p for p in points.POINTS if p[0] == "matrix"] + points.CORE),
    ids=names_of,
)
def test_outer_gradients_are_finite_differences(names, x64):
    """Of the initial weights and of every learning rate and gate; non-zero."""
    params = points.params(names, jnp.float64)
    x = points.tokens(names, LENGTH, np.float64)
    level = points.level(names, CHUNK)
    gates = ("learning_rate", "decay", "momentum", "threshold")
    trainable = (params, {g: getattr(x, g) for g in gates if getattr(x, g) is not None})

    @jax.jit
    def loss(trainable):
        weights, gates = trainable
        y, _ = run(level, weights, x._replace(**gates))
        return jnp.sum(jnp.sin(y))

    gradient = jax.grad(loss)(trainable)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(trainable)
    for index, leaf in enumerate(leaves):
        direction = rng.normal(size=leaf.shape)

        def at(step, index=index, leaf=leaf, direction=direction):
            moved = list(leaves)
            moved[index] = leaf + step * direction
            return float(loss(jax.tree.unflatten(tree, moved)))

        step = 1e-6
        numeric = (at(step) - at(-step)) / (2 * step)
        exact = float(jnp.sum(jax.tree.leaves(gradient)[index] * direction))
        assert abs(exact) > 1e-9
        assert exact == pytest.approx(numeric, rel=1e-5, abs=1e-7)


@every_point
def test_nested_vmaps_are_loops(names, x64):
    """Forward and backward, in chunks longer than the blocks of a triangular inverse (16)."""
    level = points.level(names, 20, read="running")

    def both(given):
        y, end = run(level, *given)
        return y, end.state

    def draw(i):
        return points.params(names, jnp.float64, seed=i), points.tokens(names, 20, np.float64, i)

    tolerance = 1e-4 if names[2] == "lq" else 1e-7  # |A|^(1/3) magnifies rounding near A = 0
    depths = (1, 2, 3) if names in points.CORE else (3,)
    check_vmaps(both, draw, depths=depths, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_sample_of_the_whole_product_agrees_with_its_recurrence(x64):
    sample = np.random.default_rng(0).choice(len(points.PRODUCT), size=16, replace=False)
    for names in (points.PRODUCT[i] for i in sample):
        params = points.params(names, jnp.float64)
        x = points.tokens(names, CHUNK, np.float64)
        first, second = (
            points.level(names, CHUNK, implementation=implementation)
            for implementation in ("xla", "reference")
        )
        close(
            first.step(params, first.init(params), x),
            second.step(params, second.init(params), x),
            1e-8 if names[2] == "lq" else 1e-10,  # |A|^(1/3) magnifies rounding near A = 0
        )


def test_an_anchored_read_streams_in_constant_time():
    names = ("deep", "l2", "decay", "delta+momentum")
    level = points.level(names, CHUNK, read="anchor")
    params, x = points.params(names), points.tokens(names, 11)
    whole, end = run(level, params, x)
    pieces = (jax.tree.map(lambda a, t=t: a[t : t + 1], x) for t in range(11))
    streamed = list(levels.stream(level, params, levels.start(level, params, x), pieces))
    close(jnp.concatenate([y for y, _ in streamed]), whole, 1e-5)
    close(streamed[-1][1], end, 1e-5)


def test_plan_says_how_and_why():
    assert nm.plan(nm.matrix(2, 2), nm.l2(), nm.decay(), nm.delta()).execution == "delta"
    assert nm.plan(nm.matrix(2, 2), nm.l2(), nm.decay(), nm.omega(2)).execution == "omega"
    kl = (nm.matrix(2, 2), nm.l2(), nm.kl(), nm.gradient())
    assert nm.plan(*kl, read="anchor").execution == "delta"
    running = nm.plan(*kl, read="running")
    assert running.execution == "sequential" and "nonlinear link" in running.reason
    assert nm.plan(*kl, implementation="reference").execution == "reference"


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: nm.plan(nm.matrix(2, 2), nm.l2(), nm.kl(), nm.delta()), "quadratic retention"),
        (lambda: nm.plan(nm.mlp((2, 2, 2)), nm.oja(), nm.decay(), nm.gradient()), "linear memory"),
        (lambda: nm.plan(nm.matrix(2, 2), nm.oja(), nm.decay(), nm.delta()), "erases by itself"),
        (lambda: nm.plan(nm.matrix(2, 2), nm.dot(), nm.none(), nm.implicit_omega(2)), "omega()"),
        (lambda: nm.plan(nm.matrix(2, 2), nm.l2(), nm.none(), nm.delta(), read="now"), "'now'"),
        (lambda: nm.with_momentum(nm.omega(2)), "sums a window"),
        (lambda: nm.omega(0), "window=0"),
        (lambda: nm.plan(nm.matrix(2, 2), nm.l2(), nm.decay(), nm.mean_gradient()), "none()"),
        (lambda: nm.with_momentum(nm.mean_gradient()), "sums a window"),
        (lambda: nm.residual_mlp((2, 3)), "use mlp"),
        (lambda: nm.mlp((2,)), "at least"),
        (
            lambda: nm.associative_memory(
                nm.matrix(2, 2), nm.l2(), nm.none(), nm.delta(), chunk_size=0
            ),
            "chunk_size=0",
        ),
    ],
)
def test_what_is_not_defined_is_refused_with_a_reason(build, message):
    with pytest.raises(ValueError, match="(?i)" + message.replace("(", r"\(").replace(")", r"\)")):
        build()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(decay=None), "decay needs Tokens.decay"),
        (dict(momentum=np.ones(4, np.float32)), "no use for Tokens.momentum"),
        (dict(threshold=np.ones(4, np.float32)), "no use for Tokens.threshold"),
        (dict(values=np.ones((4, 3), np.float32)), "values have 3 features"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(change, message):
    names = ("matrix", "l2", "decay", "delta")
    level, params = points.level(names, CHUNK), points.params(names)
    x = points.tokens(names, 4)._replace(
        **{k: v if v is None else jnp.asarray(v) for k, v in change.items()}
    )
    with pytest.raises(ValueError, match=message):
        level.step(params, level.init(params), x)


def test_weights_of_another_architecture_are_refused():
    level = points.level(("matrix", "l2", "decay", "delta"), CHUNK)
    with pytest.raises(ValueError, match="architecture.init"):
        level.init((jnp.zeros((3, 4)),))
