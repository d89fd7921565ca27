"""Text is continued in pieces and token by token; reading it whole says what the likeliest is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestedjax import levels, models
from nestedjax.run import functions, run_preset, sampler

CHANGES = {
    "layers": 1,
    "width": 16,
    "memory.heads": 1,
    "memory.head_dim": 8,
    "memory.hidden": 8,
    "cms.hidden": 16,
}


def make(**changes):
    run = run_preset("hope_nano", CHANGES | changes, length=24)
    return models.create(run.model)


@pytest.mark.parametrize("chunks", [(8, None), (8, 4), (12, None)])
@pytest.mark.parametrize("size", [1, 2, 17, 45])
def test_the_likeliest_continuation(monkeypatch, chunks, size):
    monkeypatch.setattr(functions, "PIECE", 16)  # 12 does not divide it: pieces of 24
    chunk, projections = chunks
    model = make(**{"memory.chunk_size": chunk, "memory.projection_chunk_size": projections})
    prompt = np.random.default_rng(size).integers(0, 256, size).astype(np.int32)
    definition, params = models.split(model)
    drawn = sampler(definition, tokens=6, temperature=0)(params, prompt, jax.random.key(0))
    text = np.concatenate([prompt, drawn])
    logits = jax.jit(lambda tokens: model(tokens)[0])(jnp.asarray(text[None]))
    np.testing.assert_array_equal(drawn, np.argmax(logits[0, size - 1 : -1], -1))


def test_whole_pieces_take_the_fast_path(monkeypatch):
    """They begin on a boundary, where nothing is pending."""
    seen, plain = [], levels.at_boundary

    def watched(state):
        seen.append(state)
        return plain(state)

    monkeypatch.setattr(functions, "PIECE", 16)
    monkeypatch.setattr(levels, "at_boundary", watched)
    definition, params = models.split(make(**{"memory.chunk_size": 8}))
    sampler(definition, tokens=2)(params, np.zeros(36, np.int32), jax.random.key(0))
    assert len(seen) == 2  # traced once for 16 tokens and once for the last 3
