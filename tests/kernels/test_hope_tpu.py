"""HOPE through the kernel of its memories, compiled ahead of time for a TPU."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nestedjax import models
from nestedjax.layers import SelfModifyingConfig
from nestedjax.models import CMSConfig, HopeConfig
from pallas_kernels._tpu import vmem
from tests.kernels import tpu


@pytest.mark.tpu_compile
def test_a_training_step_compiles_ahead_of_time(monkeypatch):
    """Two blocks with the heads of the 340M preset, packed documents, whole chunks and a rest."""
    limit = vmem.VMEM[tpu.TPUS["v5e"].kind]
    monkeypatch.setitem(vmem.VMEM, jax.devices()[0].device_kind, limit)
    memory = SelfModifyingConfig(heads=16, head_dim=64, hidden=64, chunk_size=64)
    config = HopeConfig(256, 256, 2, memory, CMSConfig((None,), 256), dtype="bfloat16")
    config = HopeConfig(**{**vars(config), "implementation": "pallas_tpu"})
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0))))

    def loss(weights, tokens, resets):
        logits, _ = nnx.merge(graphdef, weights)(tokens, resets=resets)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    shape = (2, 280)
    given = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
    compiled = tpu.compiled_tree(jax.value_and_grad(loss), "v5e", weights, *given)
    assert compiled.as_text().count("tpu_custom_call") >= 2
