"""`implementation=`: the kernels of every memory are in the program and compute what XLA does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nestedjax import memory, models, sharding
from nestedjax.layers import MemoryMixer, gates
from pallas_kernels.delta_rule import api as delta_rule
from pallas_kernels.delta_rule import pallas_tpu as delta_rule_tpu
from pallas_kernels.mlp_memory import api as mlp_memory
from pallas_kernels.mlp_memory import pallas_tpu as mlp_memory_tpu
from tests.models.families import LINEAR, built

HOPE = models.SelfModifyingConfig(heads=2, head_dim=64, hidden=64, chunk_size=64)


@dataclasses.dataclass(frozen=True)
class DeepConfig(models.RecurrentConfig):
    """Titans' memory, a residual MLP with momentum, in every head."""

    def mixer(self, wide, *, rngs):
        network = memory.residual_mlp((wide, wide, wide))
        level = memory.titans(
            network, chunk_size=self.chunk_size, implementation=self.implementation
        )
        return MemoryMixer(
            self,
            level,
            heads=self.heads,
            key_dim=wide,
            keys=gates.unit,
            learning_rate=gates.sigmoid(bias=-2.0),
            decay=gates.sigmoid(bias=4.0),
            momentum=gates.sigmoid(),
            start=gates.learned(network),
            rngs=rngs,
        )


def large(name, implementation):
    """Heads of 64 features and chunks of 64 tokens, which the GPU kernels need."""
    options = {"dtype": "bfloat16", "implementation": implementation}
    if name == "hope":
        return models.HopeConfig(24, 128, 2, HOPE, models.CMSConfig((None,), 16), **options)
    architecture = DeepConfig if name == "deep" else LINEAR[name]
    return architecture(24, 128, 2, 16, 2, 64, **options)


def program(config, platform):
    """A training step's gradient, lowered for a platform that this machine need not have."""
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0))))

    def loss(weights, tokens, resets):
        logits, _ = nnx.merge(graphdef, weights)(tokens, resets=resets)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    shape = (2, 128)
    given = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
    step = jax.jit(jax.value_and_grad(loss))
    return step.trace(weights, *given).lower(lowering_platforms=(platform,)).as_text()


CALL = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}


@pytest.mark.parametrize("name", [*LINEAR, "deep", "hope"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_kernel_is_in_the_program(name, platform):
    implementation = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}[platform]
    if (name, platform) == ("linear_attention", "cuda"):
        with pytest.raises(NotImplementedError, match="65"):  # one row more, for the normaliser
            program(large(name, implementation), platform)
        return
    assert CALL[platform] not in program(large(name, "xla"), platform)
    assert program(large(name, implementation), platform).count(CALL[platform]) >= 2


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels on a CPU."""
    linear = functools.partial(delta_rule_tpu.delta_rule_pallas_tpu, interpret=True)
    deep = functools.partial(mlp_memory_tpu.mlp_memory_pallas_tpu, interpret=True)
    monkeypatch.setattr(delta_rule, "delta_rule_pallas_tpu", linear)
    monkeypatch.setitem(mlp_memory._IMPLEMENTATIONS, "pallas_tpu", deep)


@pytest.mark.parametrize("name", [*LINEAR, "deep"])
def test_the_kernel_is_the_scan(name, interpreted):
    """Logits, state and every gradient; packed documents, whole chunks and a rest; on a mesh."""
    architecture = DeepConfig if name == "deep" else LINEAR[name]
    config = architecture(24, 8, 1, 8, 2, 4)
    graphdef, weights = built(config)
    kernel = dataclasses.replace(config, implementation="pallas_tpu")
    other = nnx.split(nnx.eval_shape(lambda: models.build(kernel, rngs=nnx.Rngs(0))))[0]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 11)), jnp.int32)
    resets = jnp.zeros((2, 11), bool).at[1, 8].set(True).at[0, 4].set(True)

    @functools.partial(jax.jit, static_argnums=0)
    def results(graphdef, weights):
        def total(weights):
            logits, state = nnx.merge(graphdef, weights)(tokens, resets=resets)
            return jnp.sum(jnp.sin(logits)), (logits, state)

        return jax.grad(total, has_aux=True)(weights)

    expected = results(graphdef, weights)
    assert "pallas_call" in str(jax.make_jaxpr(results, static_argnums=0)(other, weights))
    mesh = sharding.make_mesh("data=2,tensor=2", explicit=True, devices=jax.devices()[:4])
    axes = models.logical_axes(weights)
    with jax.set_mesh(mesh):
        placed = sharding.place(weights, sharding.shardings_of(weights, axes, mesh))
        found = results(other, placed)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(expected))
    jax.tree.map(same, found, expected)


def same(a, b):
    """To float32's rounding of the array's largest number."""
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: memory.hope_l2(4, 4, chunk_size=4, implementation="pallas_tpu"), "l2 objective"),
        (
            lambda: memory.memora(memory.matrix(4, 4), chunk_size=4, implementation="pallas_gpu"),
            "kl retention",
        ),
        (
            lambda: memory.titans(memory.mlp((4, 4)), chunk_size=4, implementation="pallas_tpu"),
            "of the form mlp",
        ),
        (
            lambda: memory.omega_memory(
                memory.matrix(4, 4), window=2, chunk_size=4, implementation="pallas_tpu"
            ),
            "the rule omega",
        ),
    ],
)
def test_a_memory_without_a_kernel_is_refused_with_the_reason(make, says):
    with pytest.raises(NotImplementedError, match=f"{says}.*use implementation='xla'"):
        make()


def test_a_start_that_a_kernel_would_lose_is_not_finite(interpreted):
    """A linear memory with a start of its own and packed documents: loud, not another number."""
    level = memory.delta_net(4, 4, chunk_size=2, implementation="pallas_tpu")
    begins = jnp.array([False, True])
    x = memory.Tokens(jnp.eye(4), jnp.eye(4), jnp.eye(4), jnp.full(4, 0.5))
    for start, finite in ((jnp.zeros((4, 4)), True), (jnp.ones((4, 4)), False)):
        reads = level.whole((start,), level.init((start,)), x, begins)[1]
        assert bool(jnp.all(jnp.isfinite(reads))) == finite


def test_an_implementation_that_nothing_would_use_is_refused():
    with pytest.raises(ValueError, match="is how memories run, and a TransformerConfig has none"):
        attention = models.AttentionConfig(heads=2, context=8)
        models.TransformerConfig(8, 8, 1, 8, attention, implementation="pallas_tpu")
    config = models.DeltaNetConfig(8, 8, 1, 8, 2, 4, implementation="pallas_tpu")
    level = memory.delta_net(4, 4, chunk_size=4)  # made without it
    with pytest.raises(ValueError, match="'delta_net' has no kernel: make it with implementation="):
        MemoryMixer(config, level, heads=2, key_dim=4, rngs=nnx.Rngs(0))
    config = dataclasses.replace(config, implementation="xla")
    with pytest.raises(ValueError, match="projected names 'query'; the streams are queries, keys"):
        MemoryMixer(config, level, heads=2, key_dim=4, projected=("query",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="heads=3 of value_dim=4 are not width=8"):
        MemoryMixer(config, level, heads=3, key_dim=4, out=False, rngs=nnx.Rngs(0))
