"""The same numbers as before the models moved into one file each.

`recorded/logits.npz` holds weights, tokens and logits of the library before that (commit cf8c3dd),
the weights under the names they have now: tiny models of every family with noise on every weight in
float64, and `hope_nano` after its 800 steps (`make train`, seed 0) in float32.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nestedjax import models
from nestedjax.layers import RuleConfig
from tests.models.families import FAMILIES, MEMORY, STREAM, hope

RECORDED = np.load(Path(__file__).parent / "recorded" / "logits.npz")
CONFIGS = {
    **{name: FAMILIES[name] for name in FAMILIES if f"{name}/logits" in RECORDED},
    "hope_two_chunks": hope(STREAM, dataclasses.replace(MEMORY, projection_chunk_size=2)),
    "hope_shared_dot": hope(
        STREAM,
        dataclasses.replace(
            MEMORY,
            rule=RuleConfig("dot", values="shared", erase="implicit"),
            adaptive_query=True,
        ),
    ),
    "hope_running": hope(
        STREAM,
        dataclasses.replace(
            MEMORY, read="running", rule=RuleConfig(dgd="functional"), momentum=False
        ),
    ),
    "hope_nano": dataclasses.replace(  # as it was when these weights were trained
        models.PRESETS["hope_nano"],
        memory=models.SelfModifyingConfig(heads=4, head_dim=32, hidden=32, chunk_size=32),
    ),
}


def recorded_weights(name, params):
    """The recorded weights in the structure of `params`; every one is used."""
    front = f"{name}/weights/"
    found = {key.removeprefix(front): RECORDED[key] for key in RECORDED if key.startswith(front)}

    def one(path, leaf):
        value = found.pop(jax.tree_util.keystr(path, simple=True, separator="."))
        assert value.shape == leaf.shape and value.dtype == leaf.dtype, path
        return jnp.asarray(value)

    filled = jax.tree.map_with_path(one, params)
    assert not found, sorted(found)
    return filled


def test_every_recording_is_compared():
    assert {key.split("/")[0] for key in RECORDED} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_recorded_ones(name):
    trained = name == "hope_nano"
    config = CONFIGS[name] if trained else dataclasses.replace(CONFIGS[name], dtype="float64")
    # optax raises a float to an integer count
    with jax.enable_x64(not trained), jax.numpy_dtype_promotion("standard"):
        model = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
        graphdef, params = nnx.split(model)
        weights = recorded_weights(name, params)
        given = (jnp.asarray(RECORDED[f"{name}/{what}"]) for what in ("tokens", "resets"))

        @jax.jit
        def call(weights, tokens, resets):
            return nnx.merge(graphdef, weights)(tokens, resets=resets)[0]

        logits = np.asarray(call(weights, *given))
    expected = RECORDED[f"{name}/logits"]
    largest = np.abs(expected).max()
    print(f"{name}: {np.abs(logits - expected).max() / largest:.1e} of the largest")
    tolerance = 1e-5 if trained else 1e-9
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * largest)
