"""Whole training steps on 8 devices: the losses of one device, and state that really is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nestedjax import models, optim, sharding, training
from nestedjax.checkpoint import Checkpoints
from nestedjax.layers import SelfModifyingConfig
from nestedjax.models import AttentionConfig, CMSConfig, HopeConfig, TransformerConfig

STEPS, BATCH, LENGTH, VOCAB = 20, 8, 8, 32
MEMORY = SelfModifyingConfig(heads=2, head_dim=8, hidden=8, chunk_size=4)
CONFIGS = {
    "hope": HopeConfig(VOCAB, 16, 2, MEMORY, CMSConfig((None,), 16)),
    "transformer": TransformerConfig(VOCAB, 16, 2, 32, AttentionConfig(heads=2, context=16)),
}
MESH = "data=2,fsdp=2,tensor=2"
CASES = [
    ("transformer", MESH, False),
    ("transformer", MESH, True),
    ("transformer", "data=2,tensor=2,sequence=2", True),
    pytest.param("hope", MESH, False, marks=pytest.mark.slow),
    pytest.param("hope", MESH, True, marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def optax_promotes():
    """Optax mixes dtypes in its bias correction."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Rows:
    """Random rows by step."""

    fingerprint: dict = {"rows": 0}

    def __getitem__(self, step):
        text = np.random.default_rng(step).integers(0, VOCAB // 2, (BATCH, LENGTH + 1), np.int32)
        return {"tokens": text[:, :-1], "targets": text[:, 1:]}

    def iterate(self, start):
        return (self[step] for step in range(start, STEPS))


def initial(name):
    """A fresh state, the logical axes of its weights, the loss and the optimizer."""
    model = models.build(CONFIGS[name], rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def loss(params, batch):
        logits, _ = nnx.merge(graphdef, params)(batch["tokens"])
        # A sum over a one-hot row: unlike an index it may run over a split vocabulary.
        label = jax.nn.one_hot(batch["targets"], VOCAB, dtype=logits.dtype)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * label, axis=-1)), {}

    tx = optim.adamw(optim.warmup_cosine(1e-2, steps=STEPS, warmup=4))
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    state = training.init_state(params, tx)
    return state, models.logical_axes(params), training.stateless(loss), tx


def run(name, mesh=None, folder=None):
    """Train 20 steps; the losses, and the state at the end."""
    state, axes, loss, tx = initial(name)
    batches = None
    if mesh is not None:
        state = sharding.place(state, training.state_shardings(state, axes, mesh))
        batches = sharding.batch_sharding(mesh)
    losses = []
    result = training.train(
        loss,
        state,
        tx=tx,
        dataset=Rows(),
        config=training.LoopConfig(STEPS, checkpoint_every=STEPS),
        checkpoints=None if folder is None else Checkpoints(folder),
        on_event=lambda e: (
            losses.append(e.record["loss"]) if isinstance(e, training.Stepped) else None
        ),
        sharding=batches,
    )
    assert len(losses) == STEPS
    return np.array(losses), result.state


one_device = functools.cache(lambda name: run(name)[0])


@pytest.mark.parametrize(("name", "text", "explicit"), CASES)
def test_losses_are_those_of_one_device(name, text, explicit):
    losses, state = run(name, sharding.make_mesh(text, explicit=explicit))
    expected = one_device(name)
    assert expected[-1] < expected[0] - 0.3  # it learns: 20 equal losses would prove nothing
    print(f"{name} {text} explicit={explicit}: {np.abs(losses - expected).max():.1e}")
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    if text == MESH:
        check_split(name, state)


def check_split(name, state):
    """Parameters and moments lie in parts on the devices after the last step."""
    adam = optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")
    for tree in (state.params, *adam):
        parts = {
            jax.tree_util.keystr(path, simple=True, separator="."): (
                leaf.shape,
                {shard.data.shape for shard in leaf.addressable_shards},
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        parts = {path.removesuffix(".value"): part for path, part in parts.items()}
        assert parts["embed.embedding"] == ((32, 16), {(16, 8)})
        assert parts["norm.scale"] == ((16,), {(8,)})
        block = "blocks.0."
        expected = {
            "mixer.out.kernel": ((2, 2, 8, 16), {(2, 1, 8, 8)}),
            "feed_forward.network.wo.kernel": ((2, 32, 16), {(2, 16, 8)}),
        }
        if name == "hope":
            expected = {
                "mixer.start.memories.key.inner": ((2, 2, 8, 8), {(2, 1, 4, 8)}),
                "mixer.start.memories.key.outer": ((2, 2, 8, 8), {(2, 1, 8, 4)}),
                "mixer.projections.queries.kernel": ((2, 16, 2, 8), {(2, 8, 1, 8)}),
                "feed_forward.levels.0.wi.kernel": ((2, 16, 16), {(2, 8, 8)}),
            }
        for path, part in expected.items():
            assert parts[block + path] == part, path
        whole = [path for path, (shape, split) in parts.items() if split == {shape}]
        assert all(path.endswith("output.norm.scale") for path in whole), whole
    assert {shard.data.shape for shard in state.step.addressable_shards} == {()}


def bits(tree):
    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


def test_checkpoint_on_another_mesh(tmp_path):
    state, axes, _, _ = initial("hope")
    # one moment is enough: what is read back costs a compilation for each leaf and mesh
    state = training.init_state(state.params, optax.sgd(0.1, momentum=0.9))
    mesh = sharding.make_mesh(MESH)
    state = sharding.place(state, training.state_shardings(state, axes, mesh))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, meta={})
        checkpoints.wait()
        others = [
            sharding.make_mesh("data=4,fsdp=2"),
            sharding.make_mesh("data=8", explicit=True),
            sharding.make_mesh("data=1", devices=jax.devices()[:1]),
        ]
        for other in others:
            placed = training.state_shardings(state, axes, other)
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
            )
            restored = checkpoints.restore(like)  # compares a fingerprint of every leaf, too
            assert restored is not None
            same = jax.tree.map(
                lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), *(restored.state, placed)
            )
            assert all(jax.tree.leaves(same))
            assert bits(restored.state) == bits(state)
