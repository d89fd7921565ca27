"""HOPE's memories inside the whole model: each one learns, and none erases itself or runs away."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nestedjax import models
from nestedjax.layers import MEMORIES, SelfModifyingConfig
from nestedjax.models import CMSConfig, HopeConfig

ROOT = Path(__file__).parents[2]
MEMORY = SelfModifyingConfig(heads=2, head_dim=4, hidden=4, chunk_size=4)
TINY = HopeConfig(16, 8, 1, MEMORY, CMSConfig((None, None), 8), dtype="float64")


def tokens_of(vocab, length, batch=1):
    draw = np.random.default_rng(0).integers(0, vocab, (batch, length))
    return jnp.asarray(draw, jnp.int32)


def test_every_memory_learns_through_the_models_loss(x64):
    """Oracle 37 in the model: d loss / d initial state is not zero and is the finite difference.

    Of each of the five memories of the self-modifying memory, of the read-outs of the gates, and
    of each block of the continuum memory.
    """
    graphdef, weights = nnx.split(models.build(TINY, rngs=nnx.Rngs(0)))
    tokens = tokens_of(16, 14, batch=2)

    @jax.jit
    def loss(weights):
        log_probs = jax.nn.log_softmax(nnx.merge(graphdef, weights)(tokens)[0])
        return -jnp.mean(jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=2))

    gradient = jax.jit(jax.grad(loss))(weights)
    leaves, tree = jax.tree.flatten(weights)
    slopes = jax.tree.leaves(gradient)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(weights)]
    rng, seen = np.random.default_rng(1), set()
    for index, name in enumerate(names):
        found = [m for m in (*MEMORIES, "readout") if f"'memories']['{m}']" in name]
        found += [f"block {i}" for i in range(2) if f"['feed_forward']['levels'][{i}]" in name]
        if not found:
            continue
        seen.update(found)
        assert leaves[index].dtype == jnp.float64
        assert float(jnp.max(jnp.abs(slopes[index]))) > 1e-9, name
        direction = rng.normal(size=leaves[index].shape)

        def at(step, index=index, direction=direction):
            moved = [*leaves]
            moved[index] = leaves[index] + step * direction
            return float(loss(jax.tree.unflatten(tree, moved)))

        numeric = (at(1e-5) - at(-1e-5)) / 2e-5
        exact = float(np.sum(np.asarray(slopes[index]) * direction))
        np.testing.assert_allclose(exact, numeric, rtol=1e-5, atol=1e-10, err_msg=name)
    assert seen == {*MEMORIES, "readout", "block 0", "block 1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "whole", "matrix"), [(["--published"], 5, 5), ([], 8, 30)], ids=["published", "own"]
)
def test_memories_keep_their_size_at_initialisation(options, whole, matrix):
    """|W_t| / |W_0| over 16,384 tokens of text and of noise, in every memory: bounded both ways.

    In the presets a matrix that starts small is filled by what is stored: to 17 times its start.
    A gate that keeps 0.98 of a memory has erased it after a few hundred tokens; values larger than
    keys make it run away. In a process of its own: this is arithmetic, and compiled to be fast.
    """
    threads = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "memory_norms.py", "--json", *options],
        env=os.environ | {"XLA_FLAGS": threads, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert set(found) == {f"{source}.{m}" for source in ("text", "random") for m in MEMORIES}
    for memory, spans in found.items():
        for of, (low, high) in spans.items():
            assert 0.2 < low < high < (whole if of == "whole" else matrix), (memory, spans)


@pytest.mark.parametrize("preset", ["hope", "transformer_nano"])
def test_train_and_eval_are_one_function(preset):
    if preset == "hope":
        preset = HopeConfig(16, 8, 1, MEMORY, CMSConfig((None, None), 8))
    model, tokens = models.build(preset, rngs=nnx.Rngs(0)), tokens_of(16, 14)
    call = nnx.jit(lambda model, tokens: model(tokens))
    model.train()
    trained, after = call(model, tokens)
    model.eval()
    evaluated, also = call(model, tokens)
    np.testing.assert_array_equal(trained, evaluated)
    jax.tree.map(np.testing.assert_array_equal, after, also)
