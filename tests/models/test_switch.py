"""Switches of built models, by construction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nestedjax import levels, memory, models
from nestedjax.layers import FeedForward, MemoryMixer
from nestedjax.models import switch as switching
from tests.models import families

VOCAB = families.VOCAB
LENGTH = 12


FAMILIES = families.FAMILIES | families.OF_PRESETS


def of(config):
    graphdef, weights = families.built(config)
    return models.merge(graphdef, weights)


def logits(model, tokens):
    definition, weights = models.split(model)
    return jax.jit(lambda w, t: models.merge(definition, w)(t)[0])(weights, tokens)


def with_slow(names, slow=("hope_in_context",)):
    """The names, those that take minutes to compile marked."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]


@pytest.mark.parametrize("name", with_slow(FAMILIES))
def test_every_family_is_listed_and_switched(name):
    """In one compilation: every switch changes the logits, the model itself stays as it is."""
    model = of(FAMILIES[name])
    known = models.switches(model)
    assert len(set(known)) == len(known)
    tokens, table = families.tokens_of(LENGTH), switching.table(model)
    changed = {what: models.switched(model, dict([pair])) for pair, what in table.items()}
    graphdefs = {what: models.split(other)[0] for what, other in changed.items()}
    weights = models.split(model)[1]

    @jax.jit
    def every(weights, tokens):
        plain = models.merge(models.split(model)[0], weights)(tokens)[0]
        return plain, [models.merge(g, weights)(tokens)[0] for g in graphdefs.values()]

    jax.clear_caches()  # of the many programs of this file
    with jax.numpy_dtype_promotion("standard"):  # of optax
        plain, found = every(weights, tokens)
    for what, y in zip(graphdefs, found, strict=True):
        assert bool(jnp.isfinite(y).all()), what
        assert float(jnp.abs(y - plain).max()) > 1e-6, what
    assert switching.table(model) == table


@pytest.mark.parametrize("preset", [n for n in models.PRESETS if n.split("_")[-1] == "nano"])
def test_every_small_preset_is_listed(preset):
    model = models.abstract(lambda: models.create(preset))
    known = models.switches(model)
    config = models.PRESETS[preset]
    memories = {pair for pair in known if pair[0] == "memories"}
    assert len(memories) == (4 if config.chunks else 0)
    for pair in known:
        models.switched(model, dict([pair]))
    if config.continuum is not None:
        blocks = {name for name, _ in known if name.startswith("cms.")}
        assert len(blocks) == len(config.continuum.periods)


def test_names_are_those_of_the_levels_and_the_configuration():
    names = [n for n, _ in dict.fromkeys(models.switches(of(families.FAMILIES["hope"])))]
    assert list(dict.fromkeys(names)) == [
        *("key", "learning_rate", "decay", "value", "memory", "projections", "memories"),
        *("self_modifying", "cms", "cms.0", "cms.1", "convolutions"),
    ]
    found = models.switches(of(families.FAMILIES["deltanet"]))
    assert ("convolutions.keys", "skipped") in found and ("delta_net", "skipped") in found
    bare = dataclasses.replace(families.ATTENTION, conv=0)
    plain = models.TransformerConfig(VOCAB, 8, 1, 12, bare)
    model = models.abstract(lambda: models.create(plain))
    assert models.switches(model) == []
    with pytest.raises(ValueError, match="the model has no memory, continuum block or conv"):
        models.switched(model, {"memories": "skipped"})


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "retnet", "linear_attention"])
def test_a_memory_that_starts_empty_and_is_not_written_adds_nothing(name):
    """Its reads are zero, norm and projection of zero are zero: the layer skipped."""
    model, tokens = of(families.FAMILIES[name]), families.tokens_of(LENGTH)
    skipped = logits(models.switched(model, {"memories": "skipped"}), tokens)
    for switch in ("not_written", "frozen"):
        other = logits(models.switched(model, {"memories": switch}), tokens)
        np.testing.assert_allclose(other, skipped, atol=1e-5)


@pytest.mark.parametrize("name", ["hope", "hope_nano", "hope_linear_nano"])
def test_a_frozen_memory_is_one_that_has_a_rate_of_zero(name):
    """HOPE with learning rates of 0 and decays of 1, by the biases of its gates."""
    config = FAMILIES[name]
    model, tokens = of(config), families.tokens_of(LENGTH)
    graphdef, weights = models.split(model)

    def still(path, leaf):
        bias = {"learning_rate_bias": -1e4, "decay_bias": 1e4}
        name = next((n for n in bias if n in str(path)), None)
        return leaf if name is None else jnp.full_like(leaf, bias[name])

    by_gates = models.merge(graphdef, jax.tree_util.tree_map_with_path(still, weights))
    frozen = models.switched(model, {"memories": "frozen"})
    np.testing.assert_allclose(logits(frozen, tokens), logits(by_gates, tokens), atol=1e-5)
    each = {n: "frozen" for n in (*config.memory.generating, "memory")}
    np.testing.assert_array_equal(
        logits(models.switched(model, each), tokens), logits(frozen, tokens)
    )
    both = models.switched(models.switched(model, {"projections": "frozen"}), {"memory": "frozen"})
    np.testing.assert_array_equal(logits(both, tokens), logits(frozen, tokens))


def test_convolutions_and_continuum_blocks_are_skipped():
    """A convolution with the taps of the identity, a block with an output matrix of zeros."""
    tokens = families.tokens_of(LENGTH)
    model = of(families.FAMILIES["hope"])
    graphdef, weights = models.split(model)

    def changed(path, leaf):
        path = jax.tree_util.keystr(path)
        if "input_conv" in path:
            return jnp.zeros_like(leaf).at[:, -1].set(1.0)
        return jnp.zeros_like(leaf) if "['levels'][0]['wo']" in path else leaf

    other = models.merge(graphdef, jax.tree_util.tree_map_with_path(changed, weights))
    skipped = models.switched(model, {"convolutions": "skipped", "cms.0": "skipped"})
    np.testing.assert_allclose(logits(skipped, tokens), logits(other, tokens), atol=1e-5)


@pytest.mark.parametrize("name", ["hope_in_context", "hope_attention_nested"])
def test_blocks_that_do_not_learn_in_context(name):
    """All frozen is the language model at the start's weights, with and without weight decay."""
    model, tokens = of(families.FAMILIES[name]), families.tokens_of(LENGTH)
    blocks = dict.fromkeys(model.learning, "frozen")
    still = logits(models.switched(model, blocks), tokens)
    np.testing.assert_allclose(still, logits(model.base, tokens), atol=1e-4)
    reset = logits(models.switched(model, dict.fromkeys(model.learning, "reset")), tokens)
    np.testing.assert_array_equal(reset, still)
    assert float(jnp.abs(logits(model, tokens) - still).max()) > 1e-3


def test_a_context_goes_on_with_a_switch():
    model = models.switched(of(families.FAMILIES["hope"]), {"memories": "reset", "cms": "skipped"})
    tokens = families.tokens_of(LENGTH)
    whole, _ = model(tokens)
    first, state = model(tokens[:, :5])
    second, _ = model(tokens[:, 5:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["hope", "hope_nano", "gated_deltanet"])
def test_gates_that_are_watched(name):
    """The model computes the same, whole or in pieces; ranges are those of every token."""
    model, tokens = of(FAMILIES[name]), families.tokens_of(LENGTH)
    watched = models.watched(model)
    y, state = watched(tokens, watched.init_state(2))
    np.testing.assert_allclose(y, model(tokens)[0], atol=1e-5)
    found = models.gate_ranges(watched, state)
    _, other = watched(tokens[:, :5])
    _, other = watched(tokens[:, 5:], other)
    for key, reach in models.gate_ranges(watched, other).items():
        np.testing.assert_allclose(reach, found[key], rtol=1e-5)
    for least, mean, most in found.values():
        assert 0 <= least < mean < most <= 1
    assert {gate for _, gate in found} >= {"learning_rate", "decay"}
    if name == "gated_deltanet":  # the gate of the first layer, from the activations themselves
        config = dataclasses.replace(families.FAMILIES[name], layers=1)
        model = of(config)
        block = nnx.merge(*nnx.split(model)).blocks[0]
        graphdef, weights = nnx.split(block)
        block = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], weights))
        gate = block.mixer.gates["learning_rate"](block.mixer_norm(model.embed(tokens)))
        watched = models.watched(model)
        reach = models.gate_ranges(watched, watched(tokens)[1])["gated_delta_net", "learning_rate"]
        np.testing.assert_allclose(reach, (gate.min(), gate.mean(), gate.max()), rtol=1e-5)


# ---- Training without writes


@pytest.mark.parametrize(
    "name",
    [
        "hope",
        "hope_in_context",
        "deltanet",
        "hope_attention_nested",
        "hope_nano",
        "hope_linear_nano",
    ],
)
def test_a_model_without_writes_is_the_one_that_is_frozen(name):
    config = FAMILIES[name]
    model, tokens = of(config), families.tokens_of(LENGTH)
    never = of(dataclasses.replace(config, writes=False))
    jax.tree.map(np.testing.assert_array_equal, models.weights(model), models.weights(never))
    switched = models.switched(model, {"memories": "frozen"})
    np.testing.assert_array_equal(logits(never, tokens), logits(switched, tokens))
    assert float(jnp.abs(logits(never, tokens) - logits(model, tokens)).max()) > 1e-3
    again = models.switched(never, {"memories": "not_written"})
    np.testing.assert_array_equal(logits(again, tokens), logits(never, tokens))


def test_what_has_no_writes_is_refused():
    transformer = families.FAMILIES["transformer"]
    with pytest.raises(ValueError, match="a TransformerConfig has no memory that is written in"):
        dataclasses.replace(transformer, writes=False)
    with pytest.raises(ValueError, match="HopeAttentionConfig has no memory"):
        dataclasses.replace(families.FAMILIES["hope_attention"], writes=False)
    with pytest.raises(ValueError, match="implementation='pallas_gpu' has no switches"):
        families.hope(families.STREAM, implementation="pallas_gpu", writes=False)


@dataclasses.dataclass(frozen=True)
class OwnConfig(models.ModelConfig):
    """A model with a level that says nothing of its memories."""

    def block(self, *, rngs):
        level = memory.delta_net(4, 4, chunk_size=4)._replace(switched=None, memories=())
        rate = {"learning_rate": memory_gate()}
        mixer = MemoryMixer(self, level, heads=2, key_dim=4, rngs=rngs, **rate)
        return models.Block(self, mixer, FeedForward(self, 8, rngs=rngs))

    @property
    def chunks(self):
        return (4,)


def memory_gate():
    from nestedjax.layers import gates

    return gates.sigmoid()


def test_a_level_that_cannot_be_switched_is_refused():
    model = models.abstract(lambda: models.create(OwnConfig(16, 8, 1)))
    says = "the level 'delta_net' cannot be switched: give it `memories` and `switched`"
    with pytest.raises(ValueError, match=says):
        models.switches(model)
    with pytest.raises(ValueError, match=says):
        models.switched(model, {"memories": "frozen"})
    models.switched(model, {"delta_net": "skipped"})
    with pytest.raises(ValueError, match=says):
        models.abstract(lambda: models.create(OwnConfig(16, 8, 1, writes=False)))


def test_mistakes_name_what_there_is():
    model = models.abstract(lambda: models.create("hope_nano"))
    for how, says in (
        ({"memory": "skipped"}, "'memory' has no switch 'skipped'; it has not_written, frozen"),
        ({"cms.0": "frozen"}, "'cms.0' has no switch 'frozen'; it has skipped"),
        ({"memorys": "frozen"}, "no 'memorys' to switch; .*memory"),
    ):
        with pytest.raises(ValueError, match=says):
            models.switched(model, how)


# ---- A memory that is needed


def recall(rng, batch=32, pairs=3, keys=6, values=6):
    """Pairs of a key and a value, then each key again: what follows is its value."""
    rows = []
    for _ in range(batch):
        k, v = rng.permutation(keys)[:pairs], keys + rng.integers(0, values, pairs)
        told = np.stack([k, v], 1).reshape(-1)
        again = rng.permutation(pairs)
        rows.append(np.concatenate([told, np.stack([k[again], v[again]], 1).reshape(-1)]))
    tokens = np.array(rows, np.int32)
    mask = np.zeros_like(tokens[:, 1:], bool)
    mask[:, 2 * pairs :: 2] = True
    return jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), jnp.asarray(mask)


@pytest.mark.slow
def test_a_memory_that_is_needed_shows_it():
    """DeltaNet on recall: solved with its memory, no better than guessing without its writes."""
    config = models.DeltaNetConfig(12, 32, 2, 32, 2, 4)
    definition, weights = models.split(models.create(config))

    def loss(weights, tokens, targets, mask):
        y = models.merge(definition, weights)(tokens)[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(y, targets)
        return jnp.where(mask, losses, 0.0).sum() / mask.sum().astype(losses.dtype)

    tx = optax.adam(5e-3)

    @jax.jit
    def step(weights, state, *batch):
        value, gradient = jax.value_and_grad(loss)(weights, *batch)
        updates, state = tx.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    rng, state = np.random.default_rng(0), tx.init(weights)
    with jax.numpy_dtype_promotion("standard"):  # of optax
        for _ in range(400):
            weights, state, value = step(weights, state, *recall(rng))
    assert float(value) < 0.2
    batch = recall(rng, batch=64)
    model = models.merge(definition, weights)
    definition = models.split(models.switched(model, {"memories": "not_written"}))[0]
    assert float(jax.jit(loss)(weights, *batch)) > 1.0  # `loss` reads `definition` when traced


def test_levels_know_the_switches():
    assert levels.SWITCHES == ("not_written", "frozen", "reset")
