"""Size of every self-modifying memory over a long context, of an untrained model or of a run.

Claim:     at initialisation |W_t| / |W_0| stays within [0.2, 8] over 16,384 tokens for every memory
           of every layer and head, on text and on random tokens; with the published write
           (--published) within [0.2, 5], and so do the two matrices of each by themselves. In a
           trained model it need not: see "Trained", of the write as it was published
Command:   python -m experiments.memory_norms [--published] [--preset NAME | --run runs/hope_nano]
Rules:     python -m experiments.memory_norms --rules --tokens 65536 [--only hope_nano]
           every choice of the menu of writes, changed alone from the memories of three presets and
           from the published one, in models of one layer with heads of 16 features: one row each
Data:      the text that ships with the package; bytes drawn uniformly
Hardware:  1 CPU core, half a minute; --rules six minutes
Expected:  hope_nano: whole memories [1.05, 5.1]; output matrices, which start small, to 17.
           --published: text [0.82, 1.68], random [0.67, 1.62]; single matrices [0.41, 5.0].
           --rules: `experiments/rules.py` says which rules run away; the table is in LOG.md
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
from experiments import rules
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


def looks(model, length, seed):
    """Squared norms at the start and after every `PIECE` tokens of text and of random ones.

    [layers, 2, heads, memories, matrices], and with the looks in front.
    """
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
    return np.asarray(start), np.stack(seen)


def measure(model, length, seed):
    """Least and largest ratio of every memory: {memory: {"whole" or "matrix": [low, high]}}."""
    start, seen = looks(model, length, seed)
    whole = np.sqrt(seen.sum(-1) / start.sum(-1))
    matrix = np.sqrt(seen / start)
    found = {}
    for source, name in enumerate(("text", "random")):
        for index, memory in enumerate(MEMORIES):
            ratios = whole[:, :, source, :, index], matrix[:, :, source, :, index]
            spans = [[float(r.min()), float(r.max())] for r in ratios]
            found[f"{name}.{memory}"] = dict(zip(("whole", "matrix"), spans, strict=True))
    return found


def one_layer(base, memory):
    """A model of one layer around a memory, as its preset has it."""
    preset = "hope_nano" if base == rules.PUBLISHED else base
    width, cms = memory.heads * memory.head_dim, models.CMSConfig(periods=(None,), hidden=8)
    config = nj.run_preset(preset).model
    return dataclasses.replace(config, width=width, layers=1, memory=memory, cms=cms)


def measure_rule(config, length, seed):
    """What becomes of the memories of one rule: |W_t| / |W_0|, of the generating and the queried.

    A memory that starts at zero, M(z) = z + U z, is measured by the identity that it starts as.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        start, seen = looks(models.create(config, seed=seed), length, seed)
        start, seen = start.sum(-1), seen.sum(-1)
        ratios = np.sqrt(seen / np.where(start == 0, config.memory.head_dim, start))
    finite = np.isfinite(ratios).all(axis=(1, 2, 3, 4))
    least, half = int(np.argmin(finite)) * PIECE, len(ratios) // 2
    if not finite.all():  # what was seen before
        ratios = ratios[: max(1, least // PIECE)]
    found = {
        name: [float(part.min()), float(part.max())]
        for name, part in (("generating", ratios[..., :-1]), ("queried", ratios[..., -1:]))
    }
    found["halves"] = [float(part.max()) for part in (ratios[:half], ratios[half:]) if part.size]
    return found | {"finite": length if finite.all() else least}


def measure_rules(only, length, seed, show):
    """Every row of the menus, shown as soon as it is measured: {base: {choice: what was found}}."""
    found = {}
    for base in rules.BASES if only is None else [only]:
        found[base] = {}
        for words, memory in rules.menu(rules.base(base)).items():
            row = measure_rule(one_layer(base, memory), length, seed)
            row["bounded"] = rules.bounded(memory)
            found[base][words] = row
            show(f"{base}: {words}", row)
    return found


def show_rule(name, row):
    spans = [f"{n} [{row[n][0]:.3g}, {row[n][1]:.3g}]" for n in ("generating", "queried")]
    halves = ", ".join(f"{largest:.3g}" for largest in row["halves"])
    told = "" if row["bounded"] else "; not bounded at any rate"
    print(
        f"{name:68}",
        *spans,
        f"largest of halves {halves}; finite {row['finite']}{told}",
        flush=True,
    )


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
    parser.add_argument("--rules", action="store_true", help="one row for every choice of a write")
    parser.add_argument("--only", choices=rules.BASES, help="with --rules, those changed from it")
    given = parser.parse_args()
    if given.rules:
        show = (lambda *_: None) if given.json else show_rule
        found = measure_rules(given.only, given.tokens, given.seed, show)
        if given.json:
            print(json.dumps(found))
        return
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
