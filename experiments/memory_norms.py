"""Size of every self-modifying memory over a long context, of an untrained model or of a run.

Claim:     at initialisation |W_t| / |W_0| stays within [0.2, 8] over 16,384 tokens for every memory
           of every layer and head, on text and on random tokens; with the published write
           (--published) within [0.2, 5], and so do the two matrices of each by themselves. In a
           trained model it need not: see "Trained", of the write as it was published
Command:   python -m experiments.memory_norms [--published] [--preset NAME | --run runs/hope_nano]
Data:      the text that ships with the package; bytes drawn uniformly
Hardware:  1 CPU core, half a minute
Expected:  hope_nano: whole memories [1.2, 5.0]; output matrices, which start small, to 17.
           --published: text [0.87, 1.64], random [0.70, 1.48]; single matrices [0.48, 4.6]
Trained:   `make train` (seed 0, val_loss 1.6351): text [0.000, 0.76], random [0.000, 11.4]; single
           matrices up to 22.5: some memories erase themselves for good, others grow
Before:    with keep near 0.98 at the start (logit 4) and keys and values of norm sqrt(d), every
           memory was at 0.000 of its size after 512 random tokens; with keep near 1 it ran away
           (640 times on text) and then erased itself
"""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

import nestedjax as nj
from nestedjax import data, models
from nestedjax.layers import MEMORIES, SelfModifyingConfig
from pallas_kernels.mlp_memory import FastWeights

PIECE = 512  # tokens between two looks
SIZES = ("heads", "head_dim", "hidden", "chunk_size")


def squared_norms(state):
    """|V|^2 and |U|^2 of every memory, [layers, batch, heads, memories, matrices]."""
    pairs, held = [], state[0]["mixer"]["memory"].state
    # One group with a common chunk size; else the projections, then the one that is queried.
    for fast in [held] if isinstance(held, FastWeights) else [part.state for part in held]:
        matrices = [w for w in (fast.inner, fast.outer) if w is not None]  # linear ones have one
        pairs.append(jnp.stack([jnp.sum(w**2, (-2, -1)) for w in matrices], -1))
    return jnp.concatenate(pairs, axis=3)


def measure(model, length, seed):
    """Least and largest ratio of every memory: {memory: {"whole" or "matrix": [low, high]}}."""
    text = np.frombuffer(data.bundled().read_bytes(), np.uint8)[:length]
    noise = np.random.default_rng(seed).integers(0, model.config.vocab, length)
    tokens = jnp.asarray(np.stack([text, noise]), jnp.int32)
    definition, weights = models.split(model)

    @jax.jit
    def advance(tokens, state):
        _, state = models.merge(definition, weights).hidden(tokens, state)
        return state, squared_norms(state)

    state = model.init_state(2)
    start, seen = squared_norms(state), []
    for first in range(0, length, PIECE):
        state, now = advance(tokens[:, first : first + PIECE], state)
        seen.append(np.asarray(now))
    seen = np.stack(seen)
    whole = np.sqrt(seen.sum(-1) / np.asarray(start).sum(-1))
    matrix = np.sqrt(seen / np.asarray(start))
    found = {}
    for source, name in enumerate(("text", "random")):
        for index, memory in enumerate(MEMORIES):
            ratios = whole[:, :, source, :, index], matrix[:, :, source, :, index]
            spans = [[float(r.min()), float(r.max())] for r in ratios]
            found[f"{name}.{memory}"] = dict(zip(("whole", "matrix"), spans, strict=True))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="hope_nano")
    parser.add_argument("--run", help="the folder of a trained run, in place of a preset's start")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--published", action="store_true", help="the preset's sizes with the published write"
    )
    given = parser.parse_args()
    if given.run is None:
        config = nj.run_preset(given.preset).model
        if given.published:
            sizes = {n: getattr(config.memory, n) for n in SIZES}
            config = dataclasses.replace(config, memory=SelfModifyingConfig(**sizes))
        model = models.create(config, seed=given.seed)
    elif given.published:
        parser.error("--published is how an untrained model is made; leave it out with --run")
    else:
        model = nj.load(given.run).model
    found = measure(model, given.tokens, given.seed)
    if given.json:
        print(json.dumps(found))
        return
    for name, spans in found.items():
        print(f"{name:16}", *(f"{k} [{low:.3f}, {high:.3f}]" for k, (low, high) in spans.items()))


if __name__ == "__main__":
    main()
