"""One of two processes with two devices each: six steps at once, then the last three again.

The second run continues from the first one's checkpoint of step 3 and must end bit for bit alike.
Usage: python -m tests.sharding.process RANK PORT FOLDER
"""

import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

from nestedjax import models, optim, sharding, training
from nestedjax.checkpoint import Checkpoints, fingerprints
from nestedjax.models import AttentionConfig, TransformerConfig

CONFIG = TransformerConfig(32, 16, 1, 32, AttentionConfig(heads=2, context=16))
STEPS, ROWS, VOCAB = 6, 4, 32


class Rows:
    """This process's rows of each step."""

    fingerprint: dict = {"rows": 0}

    def __getitem__(self, step):
        text = np.random.default_rng(step).integers(0, VOCAB // 2, (2 * ROWS, 9), np.int32)
        text = text[ROWS * jax.process_index() :][:ROWS]
        return {"tokens": text[:, :-1], "targets": text[:, 1:]}

    def iterate(self, start):
        return (self[step] for step in range(start, STEPS))


def train(mesh, folder):
    """Losses by step, and the fingerprints of the last state."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optim.adamw(1e-2))
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: models.build(CONFIG, rngs=nnx.Rngs(0))))

    def make():
        model = models.build(CONFIG, rngs=nnx.Rngs(0))
        return training.init_state(nnx.state(model, nnx.Param), tx)

    def loss(params, batch):
        logits, _ = nnx.merge(graphdef, params)(batch["tokens"])
        label = jax.nn.one_hot(batch["targets"], VOCAB, dtype=logits.dtype)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * label, axis=-1)), {}

    shapes = jax.eval_shape(make)
    placed = training.state_shardings(shapes, models.logical_axes(shapes.params), mesh)
    losses = {}

    def record(event):
        if isinstance(event, training.Stepped):
            losses[event.step] = event.record["loss"]

    with Checkpoints(folder) as checkpoints:
        result = training.train(
            training.stateless(loss),
            jax.jit(make, out_shardings=placed)(),
            tx=tx,
            dataset=Rows(),
            config=training.LoopConfig(STEPS, checkpoint_every=3),
            checkpoints=checkpoints,
            on_event=record,
            sharding=sharding.batch_sharding(mesh),
        )
    return losses, fingerprints(result.state)


def main(rank, port, folder):
    """Check what the head of this file says."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    assert jax.device_count() == 4 and jax.local_device_count() == 2
    mesh = sharding.make_mesh("data=2,tensor=2")
    losses, end = train(mesh, folder / "whole")
    if rank == 0:
        shutil.copytree(folder / "whole" / "3", folder / "again" / "3")
    multihost_utils.sync_global_devices("copied")
    again, same = train(mesh, folder / "again")
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and sorted(again) == [4, 5, 6]
    assert all(again[step] == losses[step] for step in again)
    assert same == end
    try:
        sharding.batch_sharding(sharding.make_mesh("tensor=4"))
    except sharding.MeshError as error:
        assert "in several of 2 processes" in str(error)
    else:
        raise AssertionError("a row of a batch was allowed in two processes")
    print("alike:", *(losses[step].hex() for step in sorted(losses)))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
