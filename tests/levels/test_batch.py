"""`run_batch` against one sequence at a time, and what a batch does not pay for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from nestedjax import levels
from tests.contracts.test_levels import SYSTEMS, build, tokens
from tests.levels.systems import gradient_level, make_params
from tests.levels.test_compose import make_nested, nested_params


def systems():
    for name, specification in SYSTEMS.items():
        yield name, *build(specification)
    yield "nested", make_nested(), nested_params()


CASES = pytest.mark.parametrize(
    ("system", "params"), [pytest.param(*case, id=name) for name, *case in systems()]
)


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def each(function, *batched):
    """`function` of each sequence alone, stacked."""
    count = jax.tree.leaves(batched)[0].shape[0]
    found = [function(*jax.tree.map(lambda a: a[i], batched)) for i in range(count)]  # noqa: B023
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def without_notes(tree):
    """Notes may be kept or not; everything else is the same."""

    def bare(node):
        return node.tokens if isinstance(node, levels.Unfinished) else node

    return jax.tree.map(bare, tree, is_leaf=lambda node: isinstance(node, levels.Unfinished))


@CASES
@pytest.mark.parametrize("in_turn", [False, True])
def test_equals_each_sequence_alone(system, params, in_turn):
    period = system.period
    x = np.stack([tokens(2 * period + 3, seed) for seed in range(3)])
    where = np.zeros(x.shape[:2], bool)
    where[1, period] = True  # so that positions differ from here on
    first = levels.run_batch(system, params, None, x, reset=where, in_turn=in_turn)

    def alone(x, where):
        return levels.run(system, params, system.init(params), x, reset=jnp.asarray(where))

    close(first, each(alone, x, where))
    more = np.stack([tokens(5, seed) for seed in range(3, 6)])
    found = levels.run_batch(system, params, first[1], more, in_turn=in_turn)
    close(found, each(lambda c, x: levels.run(system, params, c, x), first[1], more))


@CASES
def test_one_token_each_from_different_positions(system, params):
    period = system.period
    ahead = [tokens(count, count) for count in (0, 1, period - 1)]
    run = jax.jit(lambda c, x: levels.run(system, params, c, x))
    carries = [run(levels.start(system, params, tokens(1)), x)[1] for x in ahead]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *carries)
    step = jax.jit(lambda c, x: levels.run_batch(system, params, c, x))
    x = np.stack([tokens(period + 1, seed) for seed in range(10, 13)])
    outputs = []
    for t in range(period + 1):
        y, batch = step(batch, x[:, t : t + 1])
        outputs.append(y)
    expected = [run(carry, x[i]) for i, carry in enumerate(carries)]
    y, expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    close(jnp.concatenate(outputs, 1), y)
    close(without_notes(batch), without_notes(expected))


def outside_branches(jaxpr):
    """The names of everything that is computed whatever the branches."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "cond":
            for inner in jaxprs_in_params(equation.params):
                yield from outside_branches(inner)


@pytest.mark.parametrize("maps", [0, 1, 2])
def test_a_token_writes_nothing_while_no_period_ends(maps):
    """The write of a gradient level is the only tanh; the step of an incremental one a cumsum."""
    system, params = build(SYSTEMS["incremental"])

    def run(carry, x):
        return levels.run(system, params, carry, x)

    carry, x = levels.start(system, params, tokens(1)), jnp.zeros((1, 3))
    for _ in range(maps):
        run = jax.vmap(run)
        carry, x = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (carry, x))
    names = set(outside_branches(jax.make_jaxpr(run)(carry, x).jaxpr))
    assert "cond" in names and not names & {"tanh", "cumsum", "scan", "while"}
    whole = jax.make_jaxpr(run)(carry, jnp.zeros((*x.shape[:-2], 8, 3)))
    assert {"tanh", "cumsum"} <= set(outside_branches(whole.jaxpr))


def test_a_branch_in_a_batch_has_the_gradient_of_each_sequence(x64):
    system, params = build(SYSTEMS["incremental"], dtype=np.float64)
    x = np.stack([tokens(9, seed, np.float64) for seed in range(2)])

    def loss(params, x):
        carry, total = levels.start(system, params, x[0]), 0.0
        carry = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), carry)
        for t in range(9):
            y, carry = levels.run_batch(system, params, carry, x[:, t : t + 1])
            total = total + jnp.sum(y**2)
        return total

    def whole(params, x):
        return jnp.sum(levels.run_batch(system, params, None, x)[0] ** 2)

    for found, expected in zip(
        jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)),
        jax.tree.leaves(jax.jit(jax.grad(whole, argnums=(0, 1)))(params, x)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_turns_are_a_loop_and_never_on_a_mesh():
    level = gradient_level("level", 4)
    params = make_params(np.random.default_rng(0), "gradient", 3)

    def text(in_turn=None, length=8, batch=4):
        run = lambda x: levels.run_batch(level, params, None, x, in_turn=in_turn)[0]  # noqa: E731
        return str(jax.make_jaxpr(run)(jnp.zeros((batch, length, 3))))

    assert levels.takes_turns(jnp.zeros((4, 8, 3))) == (jax.default_backend() == "cpu")
    assert text() == text(in_turn=levels.takes_turns(jnp.zeros((4, 8, 3))))
    assert text(in_turn=True).count("scan[") == 2 and text(in_turn=False).count("scan[") == 1
    assert text(length=1).count("scan[") == text(batch=1).count("scan[") - 1 == 0
    with jax.set_mesh(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])):
        assert text(in_turn=True).count("scan[") == 1


def test_axes_of_a_carry():
    system, params = build(SYSTEMS["incremental"])
    carry = jax.eval_shape(lambda: levels.start(system, params, tokens(1)))
    state, x, one = P("batch", "heads"), P("batch", None), P("batch")
    axes = levels.carry_axes(carry, state=state, tokens=x, sequence=one)
    first, second, third = axes.state
    assert axes[1:] == (None, one) and second == levels.Carry(state, x, one)
    assert first == third == levels.Carry(state, levels.Unfinished(x, state, one), one)
    jax.tree.map(lambda *_: None, axes, carry, is_leaf=lambda leaf: isinstance(leaf, P))  # a prefix
