"""Switched memories, against the same recurrence with the term left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax import levels
from nestedjax import memory as nm
from tests.memory import points

LENGTH, CHUNK = 10, 4
NAMED = {
    "linear_attention": (nm.linear_attention, {}),
    "retention_memory": (nm.retention_memory, {"decay"}),
    "delta_net": (nm.delta_net, {}),
    "gated_delta_net": (nm.gated_delta_net, {"decay"}),
    "hope_dot": (nm.hope_dot, {"decay"}),
    "hope_l2": (nm.hope_l2, {"decay"}),
    "longhorn": (nm.longhorn, {}),
    "longhorn_diagonal": (nm.longhorn_diagonal, {}),
    "oja_memory": (nm.oja_memory, {"decay"}),
}


def switched(level, switch):
    return level.switched({level.memories[0]: switch})


def run(level, params, x):
    return levels.run(level, params, level.init(params), x)


def close(a, b, tolerance=1e-9):
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b
    )


@pytest.mark.parametrize("names", points.POINTS, ids="-".join)
def test_every_point_of_the_product(names, x64):
    """Executions agree; a frozen memory reads its start; one that is reset is each chunk's own."""
    params, x = points.params(names, jnp.float64), points.tokens(names, LENGTH, np.float64)
    level = points.level(names, CHUNK, read="running")

    @jax.jit
    def every(x):
        reference = points.level(names, CHUNK, read="running", implementation="reference")
        found = {
            switch: [run(switched(each, switch), params, x) for each in (level, reference)]
            for switch in levels.SWITCHES
        }
        chunks = [
            run(level, params, jax.tree.map(lambda a, i=i: a[i : i + CHUNK], x))[0]
            for i in range(0, LENGTH, CHUNK)
        ]
        return found, jnp.concatenate(chunks), run(level, params, x)

    found, chunks, (plain, _) = every(x)
    for a, b in found.values():
        close(a, b, 1e-5 if names[2] == "lq" else 1e-9)
    start = level.init(params)
    link = points.entries(names)[2].link or (lambda a: a)
    weights = tuple(link(w) for w in start.weights)
    reads = points.entries(names)[0].apply(weights, x.queries)
    close(found["frozen"][0][0], reads)
    close(found["frozen"][0][1].state.weights, start.weights)
    close(found["reset"][0][0], chunks)
    # after whole chunks: the unfinished one is pending
    close(found["reset"][0][1].state.weights, start.weights)
    assert float(np.abs(found["not_written"][0][0] - plain).max()) > 1e-6


def test_token_by_token_is_one_call(x64):
    names = ("deep", "l2", "decay", "delta+momentum")
    params, x = points.params(names, jnp.float64), points.tokens(names, LENGTH, np.float64)
    for switch in levels.SWITCHES:
        level = switched(points.level(names, CHUNK), switch)
        whole, _ = run(level, params, x)
        carry = levels.start(level, params, x)
        reads = []
        for i in range(LENGTH):
            one = jax.tree.map(lambda a, i=i: a[i : i + 1], x)
            y, carry = levels.run(level, params, carry, one)
            reads.append(y)
        close(jnp.concatenate(reads), whole)


@pytest.mark.parametrize("name", NAMED)
def test_nothing_is_read_from_an_empty_memory_that_is_not_written(name):
    make, fields = NAMED[name]
    level, rng = make(4, 4, chunk_size=CHUNK), np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(LENGTH, 4)), jnp.float32) for _ in range(3)]
    gate = jnp.full((LENGTH,), 0.5, jnp.float32)
    x = nm.Tokens(*arrays, learning_rate=gate, decay=gate if "decay" in fields else None)
    params = (jnp.zeros((4, 4)),)
    assert float(jnp.abs(run(level, params, x)[0]).max()) > 0.1
    for switch in ("not_written", "frozen"):
        y, carry = run(switched(level, switch), params, x)
        assert float(jnp.abs(y).max()) == 0 and float(jnp.abs(carry.state.weights[0]).max()) == 0


def test_decay_and_erasure_act_where_nothing_is_written():
    level, unit = nm.gated_delta_net(2, 2, chunk_size=2), jnp.eye(2, dtype=jnp.float32)
    x = nm.Tokens(unit, 7 * unit, unit, learning_rate=jnp.ones(2), decay=jnp.full(2, 0.5))
    start = (jnp.asarray([[1.0, 2.0], [3.0, 4.0]]),)
    _, carry = run(switched(level, "not_written"), start, x)
    np.testing.assert_allclose(carry.state.weights[0], jnp.zeros((2, 2)))  # both keys erased
    x = x._replace(learning_rate=jnp.zeros(2))
    _, carry = run(switched(level, "not_written"), start, x)
    np.testing.assert_allclose(carry.state.weights[0], start[0] / 4)


def test_normalised_linear_attention_keeps_its_normaliser():
    level = nm.normalised_linear_attention(4, 4, chunk_size=CHUNK, feature_map=nm.elu_plus_one)
    ones = jnp.ones((LENGTH, 4), jnp.float32)
    x = nm.Tokens(ones, 3 * ones, ones, learning_rate=jnp.ones(LENGTH))
    params = (jnp.zeros((5, 4)),)
    np.testing.assert_allclose(run(level, params, x)[0], 3 * ones, rtol=1e-4)
    frozen = switched(level, "frozen")
    assert run(frozen, params, x)[0].shape == (LENGTH, 4)
    assert float(jnp.abs(run(frozen, params, x)[0]).max()) == 0


def test_compositions_switch_the_memories_of_their_levels():
    names = ("matrix", "l2", "decay", "gradient")
    parts = [points.level(names, CHUNK, name=name) for name in ("a", "b")]
    params, x = points.params(names), points.tokens(names, LENGTH)
    both = levels.parallel(*parts)
    assert both.memories == ("a", "b")
    plain, _ = run(parts[0], params, x)
    frozen, _ = run(switched(parts[1], "frozen"), params, x)
    y, _ = run(both.switched({"b": "frozen"}), (params, params), x)
    close(y, plain + frozen, 1e-5)
    inner = levels.parallel(*parts, name="inner")
    again = levels.parallel(inner, levels.parallel(*parts, name="other"), name="outer")
    assert again.memories == ("inner.a", "inner.b", "other.a", "other.b")
    every = {name: "frozen" for name in again.memories}
    four = ((params, params), (params, params))
    close(run(again.switched(every), four, x)[0], 4 * frozen, 1e-5)
    heads = levels.per_head(parts[0])
    assert heads.memories == ("a",) and heads.switched({"a": "frozen"}).memories == ("a",)


def test_what_cannot_be_switched_is_refused():
    level = nm.delta_net(4, 4, chunk_size=4)
    with pytest.raises(ValueError, match="memories are delta_net, and switches not_written"):
        level.switched({"memory": "frozen"})
    with pytest.raises(ValueError, match="switch 'delta_net': 'off'"):
        level.switched({"delta_net": "off"})
    with pytest.raises(NotImplementedError, match="'pallas_tpu' has no switches, got"):
        nm.delta_net(4, 4, chunk_size=4, implementation="pallas_tpu").switched(
            {"delta_net": "frozen"}
        )
