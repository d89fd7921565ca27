"""Every choice of the menu of writes, changed alone from the memories of the presets.

Against the token loop, outer gradients against finite differences, and what becomes of a memory at
any inner learning rate, whatever it is fed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments.rules import BASES, base, bounded, menu
from nestedjax import levels
from nestedjax.layers.self_modifying import self_modifying
from nestedjax.layers.self_modifying_config import SelfModifyingConfig, init_params
from nestedjax.memory import Tokens
from pallas_kernels.mlp_memory import FastWeights
from tests.layers.cases import draw
from tests.layers.token_loop import numpy_loop

NUMBERS = ("learning_rate_start", "projection_learning_rate")  # of the same rule


def table(names, head_dim: int, skipped=()) -> dict[str, SelfModifyingConfig]:
    """`{"base: choice": memory}` of small memories."""
    found = {}
    for name in names:
        for words, memory in menu(base(name, head_dim=head_dim)).items():
            one_of_many = words.startswith("static") and (name != "hope_nano")
            if not words.startswith(skipped) and not one_of_many:
                found[f"{name}: {words}"] = memory
    return found


EXACT = table(BASES[:3], 4, ("learning_rate_start", "projection_learning_rate 0.5"))
RATED = table(BASES, 8, NUMBERS)
# Without its clip every write from the printed form runs away: one stands for all.
RATED = {
    row: memory
    for row, memory in RATED.items()
    if not row.startswith("hope_nano_literal") or bounded(memory) or row.endswith("as it is")
}

LARGE = dataclasses.replace(RATED["hope_nano: step gradient"], inner_scale=4.0)
RATED["hope_nano: step gradient, inner_scale 4"] = LARGE  # |h|^2 near 8


@pytest.mark.parametrize("row", EXACT)
def test_a_rule_is_the_token_loop_and_its_outer_gradient_finite_differences(row, x64):
    """In one compilation; of every slow parameter, in a direction that is drawn."""
    config = dataclasses.replace(EXACT[row], hidden=6, chunk_size=4)
    params, x = draw(config)
    flat, shaped = ravel_pytree(params)
    level = self_modifying(config)

    @jax.jit
    def run(flat):
        def loss(flat):
            params = shaped(flat)
            y, _ = levels.run(level, params, level.init(params), x)
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, has_aux=True)(flat)

    (_, y), gradient = run(flat)
    expected = numpy_loop(config, params, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-10 * np.max(np.abs(expected)))
    rng = np.random.default_rng(1)
    for path, slope in jax.tree_util.tree_leaves_with_path(shaped(gradient)):
        name = jax.tree_util.keystr(path)
        # what a memory that is never written reads does not depend on the others
        if config.static != ("memory",) or path[0].key == "memory":
            assert float(jnp.max(jnp.abs(slope))) > 1e-9, name
        direction = rng.normal(size=slope.shape)
        along = jax.tree_util.tree_map_with_path(
            lambda p, a: direction if p == path else np.zeros(a.shape),  # noqa: B023
            params,
        )
        step = 1e-6 * ravel_pytree(along)[0]
        numeric = (run(flat + step)[0][0] - run(flat - step)[0][0]) / 2e-6
        exact = float(jnp.sum(slope * direction))
        np.testing.assert_allclose(exact, numeric, rtol=5e-5, atol=1e-7, err_msg=name)


RATES = (0.001, 0.1, 0.5, 0.9, 1.0)
TOKENS = 2048
AWAY = 1e6  # times its start; writes of norm one with momentum 0.9 add up to 2e4 at most


def inputs(dim: int) -> dict[str, np.ndarray]:
    """`{kind: queries, keys and values, [3, TOKENS, dim]}`."""
    rng = np.random.default_rng(0)

    def unit(*shape):
        draw = rng.normal(size=shape)
        return draw / np.linalg.norm(draw, axis=-1, keepdims=True)

    random, pair = unit(3, TOKENS, dim), unit(3, 2, dim)
    same = np.repeat(pair[:, :1], TOKENS, axis=1)
    sign = np.where(np.arange(TOKENS) % 2, -1.0, 1.0)[:, None]
    return {
        "random": random,
        "one token": same,
        "two in turn": pair[:, np.arange(TOKENS) % 2],
        "one key, its value and minus its value": same
        * np.stack([1 + 0 * sign, 1 + 0 * sign, sign]),
        "huge": 1e3 * random,
        "one huge token": 1e3 * same,
        "nothing": 0 * random,
    }


def forced(config: SelfModifyingConfig) -> tuple[SelfModifyingConfig, dict]:
    """Heads that start alike, each with a rate of `RATES`; the gates of half keep everything."""
    config = dataclasses.replace(config, heads=2 * len(RATES))
    params = init_params(jax.random.key(0), config)
    params = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), params)
    readout, rates = params["readout"], np.array(2 * RATES)
    with np.errstate(divide="ignore"):
        logits = np.clip(np.log(rates) - np.log1p(-rates), None, 80)  # sigmoid(80) is 1
    for name in NUMBERS:
        name = name.removesuffix("_start")
        if name in readout:
            readout[name] = jnp.zeros_like(readout[name])
            readout[f"{name}_bias"] = jnp.asarray(logits, jnp.float32)
    halves = np.repeat([1.0, 0.0], len(RATES))
    readout["decay"] = readout["decay"] * jnp.asarray(halves[:, None], jnp.float32)
    readout["decay_bias"] = jnp.asarray(np.where(halves, 9, 80), jnp.float32)
    return config, params


def norms(state) -> jax.Array:
    """|W| of both matrices of every memory, [heads, memories]."""
    groups = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, FastWeights))
    squares = [
        sum(jnp.sum(w**2, (-2, -1)) for w in (group.inner, group.outer) if w is not None)
        for group in groups
    ]
    return jnp.sqrt(jnp.concatenate(squares, axis=-1))


@functools.cache
def fed(dim: int, heads: int, momentum: bool) -> Tokens:
    queries, keys, values = (
        jnp.asarray(np.repeat(np.stack(kind)[:, :, None], heads, axis=2), jnp.float32)
        for kind in zip(*inputs(dim).values(), strict=True)
    )
    kept = jnp.full(keys.shape[:3], 0.9) if momentum else None
    return Tokens(keys, values, queries, momentum=kept)


@pytest.mark.parametrize("row", RATED)
def test_no_rate_makes_a_bounded_rule_run_away(row):
    """Not a number that is not finite at rates up to one, of tokens that are meant to be hard.

    And the others do: what is said of them is still so.
    """
    config, params = forced(RATED[row])
    level = self_modifying(config, remat=False)

    @jax.jit
    @jax.vmap
    def run(x):
        def chunk(state, x):
            state, y = level.step(params, state, x)
            return state, (jnp.max(jnp.abs(y)), norms(state))

        start = level.init(params)
        parts = jax.tree.map(lambda a: a.reshape(-1, config.chunk_size, *a.shape[1:]), x)
        _, (reads, sizes) = jax.lax.scan(chunk, start, parts)
        return reads, sizes / jnp.maximum(norms(start), 1.0)[None]

    reads, sizes = map(np.asarray, run(fed(config.head_dim, config.heads, config.momentum)))
    if not bounded(config):
        assert not np.all(sizes < AWAY)
        return
    for i, kind in enumerate(inputs(config.head_dim)):
        assert np.all(np.isfinite(reads[i])), kind
        assert np.all(sizes[i] < AWAY), kind
    assert float(np.max(np.abs(sizes[:, -1] - 1))) > 1e-3
