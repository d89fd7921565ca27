"""What every optimizer of the menu takes and refuses: odd trees, numbers, injected arguments."""

import inspect
import math
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestedjax import optim
from nestedjax.optim import menu
from nestedjax.optim.ranges import ranges_of
from tests.optim.running import draw

every = pytest.mark.parametrize("name", menu.OPTIMIZERS)
RULES = [getattr(optim, name) for name in optim.__all__ if name.startswith("scale_by_")]
MAKERS = [*menu.OPTIMIZERS.values(), *RULES]
OTHERS = [
    optim.warmup_cosine,
    optim.at_writes,
    optim.accumulate,
    optim.nested_by_period,
    optim.clip_gradients,
    optim.features.normalized,
    optim.features.polynomial,
    optim.features.spectral,
    optim.features.random_features,
]


@pytest.fixture(autouse=True)
def standard():
    """optax's wrappers and its Adam mix types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def tree(**more):
    """Weights with a tap, so that dgd takes them as well."""
    return {"kernel": draw(3, 4), "tap": jnp.eye(3), "bias": draw(4, seed=1), **more}


def stepped(tx, params):
    def two(params):
        state = tx.init(params)
        _, state = tx.update(params, state, params)
        return tx.update(params, state, params)[0]

    return jax.jit(two)(params)


@every
def test_odd_trees(name):
    """Empty leaves, scalars, missing ones and low precision, all at once and beside a matrix."""
    params = tree(
        empty=jnp.zeros(0),
        no_rows=jnp.zeros((0, 4)),
        no_layers=jnp.zeros((0, 4, 4)),
        no_columns=jnp.zeros((4, 0)),
        scalar=jnp.ones(()),
        missing=None,
        low=draw(3, 4, seed=2).astype(jnp.bfloat16),
    )
    updates = stepped(menu.make(name, 0.1), params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), updates) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params
    )
    assert updates["missing"] is None
    for leaf in ("kernel", "scalar", "low"):
        found = np.asarray(updates[leaf], np.float32)
        assert np.isfinite(found).all() and np.abs(found).max() > 1e-6, leaf


@every
@pytest.mark.parametrize(
    ("dtype", "fix"), [(jnp.complex64, "its imaginary part"), (jnp.int32, "mask it")]
)
def test_numbers_that_are_not_real_are_refused(name, dtype, fix, unchecked):
    tx, params = menu.make(name, 0.1), tree()
    bad = {**params, "deep": [jnp.ones(3, dtype)]}
    with pytest.raises(ValueError, match=f"'deep.0' is {jnp.dtype(dtype)}; .*{fix}"):
        tx.init(bad)
    good = {**params, "deep": [jnp.ones(3)]}
    with pytest.raises(ValueError, match="'deep.0' is "):
        tx.update(bad, tx.init(good), good)


def test_accumulated_numbers_that_are_not_real_are_refused(unchecked):
    with pytest.raises(ValueError, match="'w' is complex64"):
        optim.accumulate(optax.sgd(0.1), 2).init({"w": jnp.ones(3, jnp.complex64)})


@every
def test_a_fresh_state_can_be_donated(name):
    """No buffer is in it twice, nor one of the parameters'."""
    tx, params = menu.make(name, 0.1), tree(scalar=jnp.ones(()))

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for init in (tx.init, jax.jit(tx.init)):
        copy = jax.tree.map(jnp.array, params)
        jax.jit(step, donate_argnums=(0, 1))(copy, init(copy))


@every
def test_a_state_counts_under_one_name(name):
    state = jax.eval_shape(menu.make(name, lambda count: 0.1).init, tree())
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            assert leaf.shape == () and path[-1].name == "count", path


@every
def test_hyperparameters_can_be_injected(name):
    """With the static arguments that the docstring names, and no others."""
    make = menu.OPTIMIZERS[name]
    named = re.search(r"inject_hyperparams` name\s(.*?) in\s+`static_args`", make.__doc__, re.S)
    assert named, "the docstring says nothing about optax.inject_hyperparams"
    static = re.findall(r"`(\w+)`", named[1])
    assert "functions" in named[1] and {*static} <= {*inspect.signature(make).parameters}
    # An eps that covers SOAP's null directions, which hold rounding errors alone.
    given = {"eps": 1e-2} if "eps" in ranges_of(make) else {}
    injected = optax.inject_hyperparams(make, static_args=static)(0.1, **given)
    found, expected = stepped(injected, tree()), stepped(make(0.1, **given), tree())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    taken = {"learning_rate", *(n for n, r in ranges_of(make).items() if not r.integer)}
    state = jax.eval_shape(injected.init, tree())
    numbers = {n for n in taken if isinstance(_default(make, n), int | float)}
    assert numbers <= {*state.hyperparams}, "a number that cannot be injected"


def _default(function, name):
    return inspect.signature(function).parameters[name].default


def _numbers(hint):
    """Whether a type takes a number other than a truth value."""
    inside = typing.get_args(hint)
    return hint in (int, float) or any(_numbers(part) for part in inside if part is not hint)


@pytest.mark.parametrize("function", [*MAKERS, *OTHERS], ids=lambda function: function.__name__)
def test_every_number_has_a_range_and_is_held_to_it(function, unchecked):
    signature, ranges = inspect.signature(function), ranges_of(function)
    for name, hint in typing.get_type_hints(function).items():
        if name not in ("return", "axes", "labels", "groups", "matrix", "schedule") and _numbers(
            hint
        ):
            assert name in ranges, f"{name} has no range"
    fill = {
        n: {"schedule": optax.constant_schedule(0.1), "tx": optax.sgd(0.1), "groups": {}}.get(n, 1)
        for n, p in signature.parameters.items()
        if p.default is p.empty
    }
    for name, range_ in ranges.items():
        beyond = {
            0.5 if range_.integer else math.nan,
            -math.inf,
            *([range_.low - 1] if math.isfinite(range_.low) else []),
            *([range_.high + 1] if math.isfinite(range_.high) else []),
            *([range_.low] if range_.above else []),
            *([range_.high] if range_.below else []),
        }
        for value in beyond:
            given = [value] if name == "coefficients" else value
            with pytest.raises(ValueError, match=re.escape(f"{name}={value}")) as error:
                function(**{**fill, name: given})
            assert str(range_) in str(error.value) and "\n" not in str(error.value)
        if name in signature.parameters and range_.integer:
            with pytest.raises(ValueError, match=f"{name}=True"):
                function(**{**fill, name: True})


def test_numbers_that_are_not_known_pass(unchecked):
    """Traced ones, whose values nobody knows; concrete arrays are held to the range."""
    jax.jit(lambda rate: optim.adamw(rate, b1=rate).init({"w": jnp.ones(2)}))(3.0)
    with pytest.raises(ValueError, match="b1=3.0 must be at least 0 and less than 1"):
        optim.adamw(0.1, b1=jnp.asarray(3.0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        optim.adamw(0.1, beta=3.0)
    with pytest.raises(ValueError, match="slow_weight=nan must be finite"):
        optim.m3(0.1, period=(2, 3), slow_weight=(0.1, math.nan))
    with pytest.raises(ValueError, match="period=0 must be an integer >= 1"):
        optim.by_period({"a": (0, optax.sgd(0.1))}, {"w": "a"})
    with pytest.raises(ValueError, match="period=0 must be an integer >= 1"):
        optim.nested_by_period(
            {"a": (0, optax.sgd(0.1)), "b": (2, optax.sgd(0.1))}, {"w": "a"}, chain=("a", "b")
        )


DECAYING = [
    n for n, f in menu.OPTIMIZERS.items() if "weight_decay" in inspect.signature(f).parameters
]


@pytest.mark.parametrize("name", DECAYING)
def test_one_rule_of_weight_decay(name):
    """0.1 by default, decoupled, times the learning rate, on matrices and on nothing else."""
    make, params = menu.OPTIMIZERS[name], tree(embedding=draw(5, 4, seed=3))
    assert _default(make, "weight_decay") == 0.1
    documented = " ".join(menu._documented(inspect.getdoc(make))["weight_decay"].split())
    assert documented == (
        "decoupled weight decay of the matrices, multiplied by the learning rate."
    )
    axes = {**dict.fromkeys(params), "kernel": optim.MatrixAxes(-2, -1)}
    given = {"mask": {**dict.fromkeys(params, False), "kernel": True}} if name == "adamw" else {}
    given = given or {"axes": axes}

    def last(weight_decay):
        return stepped(make(0.01, weight_decay=weight_decay, **given), params)

    found, plain = last(0.5), last(0.0)
    difference = jax.tree.map(jnp.subtract, found, plain)
    expected = -0.01 * 0.5 * params.pop("kernel")
    np.testing.assert_allclose(difference.pop("kernel"), expected, rtol=1e-3, atol=1e-6)
    jax.tree.map(lambda d: np.testing.assert_array_equal(d, 0 * d), difference)


@every
def test_the_menu_passes_no_weight_decay_and_knows_the_ranges(name):
    zero = jax.tree.map(jnp.zeros_like, tree())
    tx = menu.make(name, 0.1)
    updates, _ = tx.update(zero, tx.init(tree()), tree())
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0 * u), updates)
    ranges = ranges_of(menu.OPTIMIZERS[name])
    for argument, known in menu.arguments(name).items():
        assert known.range == ranges.get(argument)
