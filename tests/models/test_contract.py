"""What every language model of the package promises, on tiny models of every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nestedjax import levels, models
from tests.models import families
from tests.models.families import built, caller, token_losses, tokens_of

FAMILIES = families.FAMILIES | families.OF_PRESETS
LENGTH, PIECE = 21, 7
# Compiled and run; the others differ from these in parts that are tested by themselves.
RUN = ("transformer", "hope_attention", "hope", "hope_attention_nested", "gated_deltanet", "retnet")
RUN += ("linear_attention", *families.OF_PRESETS)
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in families.OF_PRESETS]
NO_RESET = jnp.zeros((2, LENGTH), bool)


@pytest.fixture(autouse=True)
def lax_promotion():
    """Adam's bias correction in optax raises a float to an int power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", params=RUN)
def family(request):
    call, model = caller(FAMILIES[request.param])
    with jax.numpy_dtype_promotion("standard"):
        whole, end = call(tokens_of(LENGTH), None, NO_RESET)
    return call, model, whole, end


def kinds(tree):
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)


def written(tree):
    """A state without the notes that only calls with one token make; they follow from the rest."""
    return jax.tree.map(
        lambda node: node.tokens if isinstance(node, levels.Unfinished) else node,
        tree,
        is_leaf=lambda node: isinstance(node, levels.Unfinished),
    )


def close(tree, other):
    tree, other = written(tree), written(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), tree, other)


def test_one_call_equals_any_split(family):
    call, model, whole, end = family
    start, tokens, outputs = model.init_state(2), tokens_of(LENGTH), []
    state = start
    for at in range(0, LENGTH, PIECE):
        logits, state = call(tokens[:, at : at + PIECE], state)
        outputs.append(logits)
        assert kinds(start) == kinds(end) == kinds(state)
    close((jnp.concatenate(outputs, 1), state), (whole, end))
    graphdef, weights = nnx.split(model)

    @jax.jit
    def one_by_one(weights, state, tokens):
        def body(state, token):
            logits, state = nnx.merge(graphdef, weights)(token[:, None], state)
            return state, logits[:, 0]

        return jax.lax.scan(body, state, tokens.T)

    state, logits = one_by_one(weights, start, tokens)
    close((jnp.moveaxis(logits, 0, 1), state), (whole, end))


def test_causal_and_isolated_exactly(family):
    call, _, whole, _ = family
    tokens = tokens_of(LENGTH)
    for at in (3, 9, 16):
        changed = tokens.at[1, at].set((tokens[1, at] + 1) % 24)
        other, _ = call(changed, None, NO_RESET)
        np.testing.assert_array_equal(other[0], whole[0])
        np.testing.assert_array_equal(other[1, :at], whole[1, :at])
        assert bool(jnp.all(jnp.any(other[1, at : at + 6] != whole[1, at : at + 6], axis=-1)))


def test_a_reset_is_a_fresh_context(family):
    call, _, whole, _ = family
    packed = jnp.concatenate([tokens_of(8, seed=1), tokens_of(LENGTH)[:, : LENGTH - 8]], axis=1)
    logits, _ = call(packed, None, NO_RESET.at[:, 8].set(True))
    close(logits[:, 8:], whole[:, : LENGTH - 8])


@pytest.mark.parametrize("name", RUN)
def test_tree_mode_is_the_same_program(name):
    def program():
        def call(weights, tokens):
            return nnx.merge(graphdef, weights)(tokens)

        config = FAMILIES[name]
        model = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
        graphdef, weights = nnx.split(model)
        return jax.jit(call).lower(weights, tokens_of(6)).as_text()

    try:
        nnx.set_graph_mode(False)
        tree = program()
    finally:
        nnx.set_graph_mode(True)
    assert tree == program()


@pytest.mark.parametrize("name", [*RUN, "hope_literal"])
def test_half_precision_keeps_memories_in_float32(name):
    config = dataclasses.replace(FAMILIES[name], dtype="bfloat16")

    def call():
        model = models.build(config, rngs=nnx.Rngs(0))
        logits, state = model(tokens_of(10))
        again, after = model(tokens_of(3), state)
        return nnx.state(model), logits, again, state, after

    weights, logits, again, state, after = jax.eval_shape(call)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    assert logits.dtype == again.dtype == jnp.float32 and kinds(state) == kinds(after)
    caches = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.dtype == jnp.bfloat16
    }
    # Activations only: attention's cache, convolutions, the tokens of an unfinished chunk.
    assert all("conv" in path or "attention" in path or "pending" in path for path in caches), (
        caches
    )


@pytest.mark.parametrize("name", ["transformer", "hope", "gated_deltanet", *SLOW])
def test_the_gradient_of_every_weight_equals_finite_differences(x64, name):
    """Issue 2, line c: also the start of each memory. In context: see `test_cms.py`."""
    graphdef, weights = built(dataclasses.replace(FAMILIES[name], dtype="float64"))
    leaves, structure = jax.tree.flatten(weights)
    tokens = tokens_of(12, batch=1)

    @jax.jit
    def value_and_gradient(leaves):
        def loss(leaves):
            model = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
            return token_losses(model(tokens)[0], tokens).mean()

        return jax.value_and_grad(loss)(leaves)

    gradient = value_and_gradient(leaves)[1]
    rng, step = np.random.default_rng(1), 1e-6
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
    for i, path in enumerate(paths):
        direction = rng.standard_normal(leaves[i].shape)
        sides = []
        for sign in (step, -step):
            moved = [*leaves[:i], leaves[i] + sign * direction, *leaves[i + 1 :]]
            sides.append(float(value_and_gradient(moved)[0]))
        numeric = (sides[0] - sides[1]) / (2 * step)
        found = float(jnp.sum(gradient[i] * direction))
        assert float(jnp.max(jnp.abs(gradient[i]))) > 0, path
        np.testing.assert_allclose(found, numeric, rtol=1e-4, atol=1e-8, err_msg=path)


@pytest.mark.parametrize("name", FAMILIES)
def test_boxes_account_for_every_weight(name):
    model = nnx.eval_shape(lambda: models.build(FAMILIES[name], rngs=nnx.Rngs(0)))
    boxes = model.boxes()
    slow = [box for box in boxes if box.period is None or box.rule == "optimizer"]
    assert sum(box.parameters for box in slow) == models.parameter_count(model)
    frequencies = [box.frequency for box in boxes]
    assert frequencies == sorted(frequencies)
    assert all(box.level is not None and box.transfer for box in boxes)


def test_what_is_recomputed_changes_no_gradient():
    tokens = tokens_of(8)

    def gradient(remat):
        graphdef, weights = built(dataclasses.replace(FAMILIES["hope"], layers=1, remat=remat))

        def loss(weights):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, weights)(tokens)[0]))

        step = jax.jit(jax.grad(loss)).lower(weights)
        return jax.tree.leaves(step.compile()(weights)), step.as_text().count("dot_general")

    expected, products = gradient("none")
    actual, more = gradient("tokens")
    assert more > products
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in RUN if FAMILIES[name].period > 1])
def test_a_document_inside_a_chunk_is_never_read_in_silence(name):
    call, model = caller(FAMILIES[name])
    period = FAMILIES[name].period
    inside = np.zeros((2, LENGTH), bool)
    inside[1, period + 1] = True
    with pytest.raises(ValueError, match=f"1 tokens after a boundary of the period {period}"):
        model(tokens_of(LENGTH), resets=jnp.asarray(inside))
    logits, state = call(tokens_of(LENGTH), None, jnp.asarray(inside))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()
    later, _ = call(tokens_of(LENGTH), state, NO_RESET)
    assert np.isnan(later[1]).all(), "the state goes on as if nothing had been wrong"
    boundary = jnp.asarray(np.roll(inside, -1))
    assert np.isfinite(call(tokens_of(LENGTH), None, boundary)[0]).all()
    _, state = call(tokens_of(LENGTH), None, NO_RESET)
    with pytest.raises(ValueError, match="the model: a document begins"):
        model(tokens_of(LENGTH), state, resets=boundary)  # LENGTH is no boundary
