"""What every optimizer keeps, whatever it does: one table, one compilation for most of it."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nestedjax import levels, optim
from nestedjax.checkpoint import Checkpoints
from tests.optim.running import draw
from tests.vmaps import check_vmaps

AXES = {"kernel": optim.MatrixAxes(-2, -1), "bias": None, "table": None, "tap": None}


class Case:
    """One optimizer: how it is made, which arguments are static, and where it is tuned to."""

    def __init__(self, make, *, static=(), rate=0.1, solves=True, **arguments):
        self.make, self.rate, self.solves = make, rate, solves
        self.arguments = arguments
        known = inspect.signature(make).parameters
        self.static = tuple(n for n in ("axes", "rest", *static) if n in known)

    def __call__(self, rate=0.1, axes=AXES):
        return self.make(rate, axes=axes, **self.arguments)


CASES = {
    "preconditioned_momentum": Case(optim.preconditioned_momentum, weight_decay=0.0, rate=0.05),
    "preconditioned by shampoo": Case(
        optim.preconditioned_momentum, weight_decay=0.0, rate=0.05, preconditioner="shampoo"
    ),
    "preconditioned by learning": Case(
        optim.preconditioned_momentum, weight_decay=0.0, rate=0.01, preconditioner="learned"
    ),
    "delta_momentum": Case(optim.delta_momentum, weight_decay=0.0, rate=0.02),
    "implicit delta_momentum": Case(
        optim.delta_momentum, weight_decay=0.0, rate=0.02, implicit=True
    ),
    "deep_momentum": Case(optim.deep_momentum, static=("max_inputs",), rate=0.05, weight_decay=0.0),
    "nonlinear_momentum": Case(
        optim.nonlinear_momentum, static=("steps",), rate=0.2, weight_decay=0.0
    ),
    "m3": Case(optim.m3, static=("period", "steps"), rate=0.2, period=3, weight_decay=0.0),
    "adamuon": Case(optim.adamuon, static=("steps",), rate=0.2, weight_decay=0.0),
    "shampoo": Case(
        optim.shampoo,
        static=("refresh", "max_side"),
        rate=0.5,
        refresh=2,
        eps=0.1,
        weight_decay=0.0,
    ),
    "soap": Case(optim.soap, static=("refresh", "max_side"), rate=0.1, refresh=2, weight_decay=0.0),
    "dgd": Case(optim.dgd, solves=False),
    "ggd": Case(optim.ggd, static=("inner_steps",), rate=0.02),
}
VARIANTS = ("preconditioned by shampoo", "preconditioned by learning", "implicit delta_momentum")
every = pytest.mark.parametrize("name", CASES)
each = pytest.mark.parametrize("name", [name for name in CASES if name not in VARIANTS])


@functools.cache
def advance(name):
    """Three updates, compiled once for all tests: (state, params, grads) -> (state, updates)."""
    tx = CASES[name]()

    def go(state, params, grads):
        def body(state, g):
            updates, state = tx.update(g, state, params)
            return state, updates

        return jax.lax.scan(body, state, grads)

    return jax.jit(tx.init), jax.jit(go)


@pytest.fixture(autouse=True)
def standard():
    """optax's wrappers and its Adam mix types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def weights(name, dtype=jnp.float32):
    params = {
        "kernel": draw(2, 4, 4),  # square: one gradient leaves SOAP's basis no freedom
        "bias": draw(4, seed=1),
        "table": draw(5, 4, seed=2),
    }
    if name == "dgd":
        params["tap"] = jnp.zeros((2, 4, 4))
    return jax.tree.map(lambda p: p.astype(dtype), params)


def gradients(name, count, dtype=jnp.float32):
    params = weights(name)
    grads = {n: draw(count, *p.shape, seed=i + 3) for i, (n, p) in enumerate(params.items())}
    if name == "dgd":
        grads["tap"] = grads["tap"] @ grads["tap"].mT / 4
    return jax.tree.map(lambda g: g.astype(dtype), grads)


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def steps(tx, params, grads):
    """All updates, and the last state."""

    def body(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    return jax.lax.scan(body, tx.init(params), grads)[::-1]


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(name, dtype):
    """Updates like the gradients, memories in float32, the state's structure stable."""
    tx, params = CASES[name](), weights(name, jnp.dtype(dtype))
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    shapes = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype))
    assert shapes(updates) == shapes(params) and shapes(after) == shapes(state)
    for leaf in jax.tree.leaves(state):
        counter = leaf.shape == () and leaf.dtype == jnp.int32
        assert leaf.dtype == jnp.float32 or counter, leaf
    new = jax.eval_shape(optax.apply_updates, params, updates)
    assert shapes(new) == shapes(params)


@each
def test_composes_with_optax(name):
    """Stacks are layers, chain, mask, MultiSteps, injected rates: all equal the plain optimizer."""
    case, params, grads = CASES[name], weights(name), gradients(name, 3)
    mask = {n: n in ("kernel", "tap") for n in params}
    kernels = {n: AXES[n] for n in params if mask[n]}

    def layer_by_layer(params, grads):
        """Vectorised over the stack by the caller, where a layer is a matrix."""
        alone = case(axes=kernels)
        one = lambda p, g: steps(alone, p, g)[0]  # noqa: E731
        pick = lambda tree: {n: tree[n] for n in kernels}  # noqa: E731
        return jax.vmap(one, (0, 1), 1)(pick(params), pick(grads))

    @jax.jit
    def go(params, grads):
        twice = jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), grads)
        inject = optax.inject_hyperparams(case.make, static_args=case.static)
        injected = inject(0.1, axes=AXES, **case.arguments)
        doubled = optax.chain(case(), optax.scale(2.0))
        return {
            "masked": steps(optax.masked(injected, mask), params, grads)[0],
            "accumulated": steps(optax.MultiSteps(doubled, 2), params, twice)[0],
            "layers": layer_by_layer(params, grads),
        }

    found = go(params, grads)
    init, plainly = advance(name)
    _, plain = plainly(init(params), params, grads)
    for n in params:
        expected = plain[n] if mask[n] else grads[n]
        np.testing.assert_allclose(found["masked"][n], expected, rtol=1e-5, atol=1e-5)
        assert not np.asarray(found["accumulated"][n])[0::2].any()
        accumulated = found["accumulated"][n][1::2]
        np.testing.assert_allclose(accumulated, 2 * plain[n], rtol=1e-5, atol=2e-5, err_msg=n)
    same(found["layers"], {n: plain[n] for n in kernels}, rtol=1e-4, atol=1e-4)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(found))
    assert np.abs(plain["kernel"]).max() > 1e-4


# they factorise matrices one by one (`pallas_kernels._linalg.lapack`), which has no reverse mode
NO_GRADIENT = ("preconditioned by shampoo", "preconditioned by learning", "shampoo", "soap")


@every
def test_nested_vmaps_and_stacks_are_loops(name):
    """Two updates of one matrix: mapped one, two and three times, and as a stack of three axes."""

    def draw_one(i):
        rng = np.random.default_rng(i)
        params, grads = {"kernel": rng.normal(size=(4, 4))}, {"kernel": rng.normal(size=(2, 4, 4))}
        if name == "dgd":
            params["tap"] = np.zeros((4, 4))
            grads["tap"] = grads["kernel"] @ grads["kernel"].swapaxes(-1, -2) / 4
        return jax.tree.map(np.float32, (params, grads))

    tx = CASES[name](axes={n: AXES[n] for n in ("kernel", "tap")})
    updates = lambda given: steps(tx, *given)[0]  # noqa: E731
    tolerance = dict(rtol=1e-3, atol=1e-3)
    check_vmaps(updates, draw_one, gradient=name not in NO_GRADIENT, **tolerance)
    given = [draw_one(i) for i in range(24)]
    params, grads = jax.tree.map(lambda *a: np.stack(a), *given)
    grads = jax.tree.map(lambda a: a.swapaxes(0, 1), grads)
    stacks = jax.tree.map(lambda a: a.reshape(2, 3, 4, 4, 4), params)
    of_stacks = jax.tree.map(lambda a: a.reshape(2, 2, 3, 4, 4, 4), grads)
    if name == "dgd":
        return  # its tap is of a layer, whose kernel is one matrix
    found = jax.jit(updates)((stacks, of_stacks))
    alone = jax.jit(jax.vmap(lambda p, g: updates((p, g)), (0, 1), 1))(params, grads)
    same(found, jax.tree.map(lambda a: a.reshape(2, 2, 3, 4, 4, 4), alone), **tolerance)


@each
def test_checkpoint_in_mid_period(name, tmp_path):
    """Saved after three updates, in the middle of a period of 2, and after one of 3."""
    params, grads = weights(name), gradients(name, 3)
    init, go = advance(name)
    first, _ = go(init(params), params, grads)
    whole, _ = go(first, params, grads)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, first, meta={})
        checkpoints.wait()
        restored = checkpoints.restore(first).state
    after, _ = go(restored, params, grads)
    same(after, whole, rtol=0, atol=0)
    same(go(first, params, grads)[0], whole, rtol=0, atol=0)  # pure: nothing of it was changed


EXPLICIT = ("m3", "delta_momentum", "deep_momentum", "soap", "dgd")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "Auto") for name in CASES if name not in VARIANTS]
    + [(n, "Explicit") for n in EXPLICIT],
)
def test_sharded(name, kind):
    """fsdp 4 x tensor 2 on 8 devices, weights split on both axes: as on one device."""
    params, grads = weights(name), gradients(name, 3)
    init, go = advance(name)
    _, expected = go(init(params), params, grads)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType[kind],) * 2)
    spec = {"kernel": (None, "fsdp", "tensor"), "tap": (None, None, "fsdp")}
    with jax.set_mesh(mesh):

        def place(tree, *leading):
            return {
                n: jax.device_put(a, NamedSharding(mesh, P(*leading, *spec.get(n, ()))))
                for n, a in tree.items()
            }

        placed = place(params)
        _, found = go(init(placed), placed, place(grads, None))
        if kind == "Explicit":
            assert tuple(found["kernel"].sharding.spec) == (None, None, "fsdp", "tensor")
    same(found, expected, rtol=1e-3, atol=1e-4)


@every
def test_minimises_a_quadratic_and_rosenbrock(name):
    """Both as matrices, so that the rule and not AdamW is at work."""
    case = CASES[name]
    if not case.solves:
        pytest.skip("dgd minimises another loss: its fixed point is in test_dgd")
    goal, count = draw(4, 3, seed=7).astype(jnp.float32), 1500
    start = {"kernel": jnp.zeros((4, 3)), "valley": jnp.array([[-1.0], [1.5]])}
    axes = optim.MatrixAxes(-2, -1)

    def loss(params):
        x, y = params["valley"][:, 0]
        curved = (1 - x) ** 2 + 10 * (y - x**2) ** 2
        return jnp.sum((params["kernel"] - goal) ** 2) + curved

    @jax.jit
    def solve(params):
        tx = case(optax.cosine_decay_schedule(case.rate, count), axes=axes)

        def body(held, _):
            params, state = held
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, (params, tx.init(params)), None, length=count)[1]

    values = solve(start)
    assert float(values[0]) > 10 and float(values[-1]) < 1e-3, values[-1]


@every
def test_decomposes_into_boxes(name):
    """Every number of the state is in a box with a name, at a level faster than the weights' or
    at a period of its own."""
    tx, params = CASES[name](), weights(name)
    state = jax.eval_shape(tx.init, params)
    boxes = levels.describe((), optim.boxes_of(state), params=params, step_tokens=64)
    memories = [box for box in boxes if box.name != "parameters"]
    assert not [box.name for box in memories if "state of" in box.name]
    held = sum(leaf.size * 4 for leaf in jax.tree.leaves(state) if leaf.shape)
    assert sum(box.state_bytes for box in memories) == held
    assert {box.period for box in memories} <= {64, 128, 192}
    weight = next(box for box in boxes if box.name == "parameters")
    assert all(box.level > weight.level for box in memories if box.period == 64)
