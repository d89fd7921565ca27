"""The smallest run with every moving part: a regression whose loss carries state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestedjax import optim, training
from nestedjax.training import LoopConfig

SIZE = 3


class ToyData:
    """Batches of 4 rows drawn from the step alone; `bad` maps a step to a value put into it."""

    def __init__(self, rows=4, bad=None, name="toy"):
        self.rows, self.bad = rows, bad or {}
        self.fingerprint = {"name": name, "rows": rows}

    def __getitem__(self, step):
        rng = np.random.default_rng(step)
        x = rng.standard_normal((self.rows, SIZE)).astype(np.float32)
        if step in self.bad:
            x[1, 2] = self.bad[step]
        return {
            "tokens": x,
            "targets": rng.standard_normal(self.rows).astype(np.float32),
            "mask": (rng.random(self.rows) < 0.7) | (np.arange(self.rows) == 0),
        }

    def iterate(self, start):
        step = start
        while True:
            yield self[step]
            step += 1


def forward(params, x):
    return jnp.tanh(x @ params["inner"].astype(x.dtype)) @ params["outer"]


def mean_loss(params, batch):
    """Mean over the masked rows, and how many there are."""
    error = forward(params, batch["tokens"]) - batch["targets"]
    tokens = jnp.sum(batch["mask"])
    loss = jnp.sum(jnp.where(batch["mask"], error**2, 0.0)) / jnp.maximum(tokens, 1).astype(
        error.dtype
    )
    return loss, {"size": jnp.max(jnp.abs(error)), "tokens": tokens}


def carried_loss(params, batch, carry):
    """The same, plus a term from a state and a random key that travel from step to step."""
    loss, metrics = mean_loss(params, batch)
    if carry is None:
        return loss, (metrics, None)
    key, noise_key = jax.random.split(carry["key"])
    shift = carry["mean"] + 0.01 * jax.random.normal(noise_key, (SIZE,))
    pull = jnp.sum((jnp.sum(params["inner"].astype(jnp.float32), 1) - shift) ** 2)
    mean = 0.9 * carry["mean"] + 0.1 * jnp.mean(batch["tokens"], 0)
    return loss + 1e-3 * pull, (metrics, {"key": key, "mean": mean})


def probe(params, batch):
    """The levels of the toy model, in order."""
    hidden = jnp.tanh(batch["tokens"] @ params["inner"].astype(jnp.float32))
    return {"inner": hidden, "outer": hidden @ params["outer"]}


SCHEDULE = optim.warmup_cosine(0.05, steps=20, warmup=4)
TX = optax.chain(optax.clip_by_global_norm(1.0), optim.adamw(SCHEDULE))


def make_state(microbatches=1, seed=0, tx=TX):
    rng = np.random.default_rng(seed)
    params = {
        "inner": jnp.asarray(rng.standard_normal((SIZE, 2)), jnp.bfloat16),
        "outer": jnp.asarray(rng.standard_normal(2), jnp.float32),
    }
    carry = {"key": jax.random.key(7), "mean": jnp.zeros(SIZE)}
    if microbatches > 1:
        carry = {
            "key": jax.random.split(jax.random.key(7), microbatches),
            "mean": jnp.zeros((microbatches, SIZE)),
        }
    return training.init_state(params, tx, seed=3, carry=carry)


def words(tree):
    """Every leaf as numpy, random keys as their data: what 'bit for bit' compares."""

    def plain(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    return jax.tree.map(plain, tree)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, words(a), words(b))


def run(state, *, steps=20, data=None, tx=TX, loss_fn=carried_loss, **options):
    config = LoopConfig(**{"steps": steps, **options.pop("config", {})})
    return training.train(
        loss_fn, state, tx=tx, dataset=data or ToyData(), config=config, **options
    )
