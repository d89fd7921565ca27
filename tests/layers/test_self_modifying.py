"""Self-modifying Titans against a token-by-token NumPy loop that shares no code with it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from experiments.rules import MENU, OF_RULE
from nestedjax import levels
from nestedjax.layers import RuleConfig
from nestedjax.layers.self_modifying import self_modifying
from nestedjax.layers.self_modifying_config import SelfModifyingConfig
from tests.layers.cases import LENGTH, draw, streamed
from tests.layers.token_loop import numpy_loop

BASE = SelfModifyingConfig(heads=2, head_dim=4, hidden=6, chunk_size=4)
LINEAR = RuleConfig("delta", dgd="none", targets="unit", inner_clip=None, decay_to="start")
U_ALONE = dataclasses.replace(LINEAR, written="outer", step="normalised")
GATES = {"projection_learning_rate": 0.05, "learning_rate_start": 0.6, "gate_gain": 2.0}
VARIANTS = {
    "default": {},
    "no momentum": {"momentum": False},
    "dot": {"rule": RuleConfig("dot")},
    "R2": {"rule": RuleConfig(dgd="input_only")},
    "R3": {"rule": RuleConfig(dgd="none")},
    "R4": {"rule": RuleConfig(dgd="functional")},
    "implicit": {"rule": RuleConfig(erase="implicit")},
    "running": {"read": "running"},
    "anchor": {"read": "anchor"},
    "shared values": {"rule": RuleConfig(values="shared")},
    "adaptive query": {"adaptive_query": True},
    "no clip": {"rule": RuleConfig(inner_clip=None)},
    "error clip": {"rule": RuleConfig(inner_clip=0.5, clip="error")},
    "U by the delta rule": {"rule": U_ALONE, **GATES, "momentum": False},
    "U by the delta rule, with momentum": {
        "rule": dataclasses.replace(U_ALONE, decay_to="zero"),
        "projection_learning_rate": 0.05,
    },
    "both by the delta rule": {
        "rule": RuleConfig("delta", dgd="input_only", step="normalised", targets="unit"),
        "read": "running",
    },
    "gradient clip": {"rule": RuleConfig(inner_clip=0.5, clip="gradient"), "momentum": False},
    "erasing U alone": {"rule": RuleConfig(dgd="output_only", erase="implicit")},
    "decay to the start": {"rule": RuleConfig(decay_to="start"), "momentum": False},
    "static": {"static": ("key", "decay"), "inner_scale": 2.0},
    "all but one static": {"static": ("key", "value", "learning_rate", "decay")},
    "queried memory static": {"static": ("memory",), "read": "running"},
    "linear": {"architecture": "linear", "momentum": False, "rule": LINEAR, **GATES},
    "linear, at once": {"architecture": "linear", "rule": RuleConfig(targets="unit")},
    "linear, residual": {
        "architecture": "residual_linear",
        "rule": dataclasses.replace(LINEAR, decay_to="zero", values="shared"),
        "read": "running",
    },
    "linear, slow projections": {
        "architecture": "linear",
        "momentum": False,
        "rule": LINEAR,
        "chunk_size": 2,
        "projection_chunk_size": 4,
        **GATES,
    },
    "slow memory": {"chunk_size": 8, "projection_chunk_size": 4},
    "slow projections": {"chunk_size": 2, "projection_chunk_size": 4},
    "token by token": {"chunk_size": 1},
}


def make(variant, length=LENGTH, seed=0):
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    return config, *draw(config, length, seed)


def test_the_table_holds_every_choice_of_the_menu():
    """So that each is streamed in every way, exactly, and is causal."""
    configs = [make(variant)[0] for variant in VARIANTS]
    for name, choices in MENU.items():
        found = {getattr(c.rule if name in OF_RULE else c, name) for c in configs}
        if name in ("static", "inner_clip", "learning_rate_start", "projection_learning_rate"):
            assert len(found) > 1, name
        else:
            assert found == set(choices), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_token_loop(x64, variant):
    config, params, x = make(variant)
    level = self_modifying(config)
    y, _ = jax.jit(lambda p, x: levels.run(level, p, level.init(p), x))(params, x)
    expected = numpy_loop(config, params, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-10 * np.max(np.abs(expected)))


CUTS = {"tokens": range(1, 16), "chunks, then tokens": [6, 7, 8, 9, 12, 13], "mixed": [1, 4, 9]}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", CUTS)
def test_any_split_equals_one_call(x64, variant, cuts):
    config, params, x = make(variant)
    level = self_modifying(config)
    whole, after = levels.run(level, params, level.init(params), x)
    y, carry = streamed(level, params, x, CUTS[cuts])
    np.testing.assert_allclose(y, whole, atol=1e-10)
    assert jax.tree.structure(carry) == jax.tree.structure(after)
    weights = levels.at_boundary((carry, after))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), *weights)


def test_token_by_token_in_float32():
    config, params, x = make("default")
    x = jax.tree.map(lambda a: a.astype(jnp.float32), x)
    level = self_modifying(config)
    whole, _ = levels.run(level, params, level.init(params), x)
    y, _ = streamed(level, params, x, range(1, 16))
    assert np.max(np.abs(y - whole)) < 1e-4 * np.max(np.abs(whole))


@pytest.mark.parametrize("variant", ["default", "anchor", "slow memory", "slow projections"])
def test_a_token_costs_the_same_in_any_chunk(variant):
    """Outside of the branches nothing is as long as the chunk but the pending tokens."""
    work = []
    for factor in (1, 16):
        config, params, x = make(variant)
        sizes = (factor * size for size in config.chunk_sizes)
        config = dataclasses.replace(
            config, **dict(zip(("chunk_size", "projection_chunk_size"), sizes, strict=True))
        )
        level = self_modifying(config)
        run = jax.vmap(lambda carry, x: levels.run(level, params, carry, x))  # noqa: B023
        one = jax.tree.map(lambda a: a[None, :1], x)
        carry = jax.tree.map(lambda a: a[None], levels.start(level, params, x))
        work.append(sum(outside_branches(jax.make_jaxpr(run)(carry, one).jaxpr)))
    assert work[0] == work[1] > 1000


def outside_branches(jaxpr):
    """Elements written by each operation but those that only move data."""
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [*jaxprs_in_params(equation.params)]
        if name in ("cond", "scatter", "dynamic_update_slice"):
            continue
        for part in inner:
            yield from outside_branches(part)
        if not inner:
            yield sum(math.prod(out.aval.shape) for out in equation.outvars)


@pytest.mark.parametrize("variant", ["default", "slow memory"])
def test_gradients_through_single_tokens(x64, variant):
    config, params, x = make(variant)
    level = self_modifying(config)

    def loss(params, cuts):
        return jnp.sum(jnp.sin(3 * streamed(level, params, x, cuts)[0]))

    expected = jax.grad(lambda params: loss(params, []))(params)
    found = jax.grad(lambda params: loss(params, range(1, 16)))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), found, expected
    )


@pytest.mark.parametrize("variant", ["default", "adaptive query"])
def test_whole_chunks_in_one_operation(x64, variant):
    """Another implementation of the operation than the scan, with documents and a rest."""
    config, params, x = make(variant, length=14)

    def run(params, x, implementation):
        level = self_modifying(config, implementation=implementation)
        reset = jnp.arange(14) == 8
        y, carry = levels.run(level, params, level.init(params), x, reset=reset)
        return jnp.sum(jnp.sin(3 * y)), (y, carry)

    found, expected = (
        jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True), static_argnums=2)(params, x, how)
        for how in ("reference", "xla")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found, expected)


def test_another_implementation_takes_one_chunk_size():
    with pytest.raises(NotImplementedError, match="one chunk size and one learning rate"):
        self_modifying(make("slow memory")[0], implementation="pallas_tpu")


@pytest.mark.parametrize("switch", ["not_written", "frozen", "reset"])
def test_a_switched_memory_says_what_it_should(x64, switch):
    """With nothing else written, reads are those of the start; two memories switch one by one."""
    config, params, x = make("no momentum")
    level = self_modifying(config)
    run = lambda level: levels.run(level, params, level.init(params), x)  # noqa: E731
    plain, _ = run(level)
    every, after = run(level.switched({name: switch for name in config.memories}))
    assert float(jnp.abs(every - plain).max()) > 1e-3
    if switch != "not_written":  # which still erases and decays
        start = level.init(params)
        jax.tree.map(np.testing.assert_array_equal, levels.at_boundary((after,))[0], start)
    one = run(level.switched({"key": switch}))[0]
    both = run(level.switched({"key": switch}).switched({"value": switch}))[0]
    assert len({float(jnp.sum(y)) for y in (plain, every, one, both)}) == 4
    with pytest.raises(ValueError, match="memories are key, learning_rate"):
        level.switched({"keys": switch})


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_and_isolated_exactly(variant):
    config, params, x = make(variant)
    x = jax.tree.map(lambda a: a.astype(jnp.float32), x)
    level = self_modifying(config)
    run = jax.jit(
        jax.vmap(lambda x: levels.run(level, params, level.init(params), x)[0], axis_size=2)
    )
    # small, so that the memory without a clip stays finite
    batch = jax.tree.map(lambda a: jnp.stack([0.3 * a, 0.3 * a + 0.3]), x)
    base = run(batch)
    changed = jax.tree.map(lambda a: a.at[1, 9:].add(0.3), batch)
    after = run(changed)
    assert bool(jnp.all(after[0] == base[0])) and bool(jnp.all(after[1, :9] == base[1, :9]))
    assert float(jnp.max(jnp.abs(after[1, 9:] - base[1, 9:]))) > 1e-3


@pytest.mark.parametrize("variant", ["default", "no momentum", "anchor"])
def test_outer_gradient_of_every_initial_state(x64, variant):
    """Non-zero for each of the five memories and equal to finite differences (spec H 37)."""
    config, params, x = make(variant)
    level = self_modifying(config)

    @jax.jit
    def loss(params):
        y, _ = levels.run(level, params, level.init(params), x)
        return jnp.sum(jnp.sin(3 * y))

    gradient = jax.jit(jax.grad(loss))(params)
    rng = np.random.default_rng(1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert float(jnp.max(jnp.abs(leaf))) > 1e-7, name
        direction = jnp.asarray(rng.normal(size=leaf.shape))

        def moved(step, path=path, direction=direction):
            return jax.tree_util.tree_map_with_path(
                lambda p, a: a + step * direction if p == path else a, params
            )

        numeric = (loss(moved(1e-6)) - loss(moved(-1e-6))) / 2e-6
        np.testing.assert_allclose(
            numeric, jnp.sum(leaf * direction), rtol=2e-5, atol=1e-7, err_msg=name
        )


def test_no_learning_rate_and_full_decay_leave_the_memories_as_they_were(x64):
    """Spec H 16: the read is then that of the initial memory."""
    config, params, x = make("R3")
    params["readout"]["learning_rate_bias"] = jnp.full((2,), -800.0)
    params["readout"]["decay_bias"] = jnp.full((2,), 800.0)
    level = self_modifying(config)
    start = level.init(params)
    y, carry = levels.run(level, params, start, x)
    q = x.queries / jnp.sqrt(jnp.sum(x.queries**2, -1, keepdims=True) + 1e-6)
    initial = params["memory"]
    h = jax.nn.gelu(jnp.einsum("hfd,thd->thf", initial["inner"], q))
    np.testing.assert_allclose(y, q + jnp.einsum("hdf,thf->thd", initial["outer"], h), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": RuleConfig(decay_to="start")}, "not defined with momentum"),
        ({"static": ("keys",)}, "names 'keys'; the memories are key, learning_rate"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"chunk_size": 16, "projection_chunk_size": 6}, "one must divide the other"),
    ],
)
def test_bad_config_says_what(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)
