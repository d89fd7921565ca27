"""What a run is made of: the loss that is trained, the state that is carried, what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nestedjax as nj
from nestedjax import run
from tests.run.tiny import HOPE, HOPE_ATTENTION


@pytest.mark.parametrize(
    ("preset", "settings"), [("hope_nano", HOPE), ("hope_attention_nano", HOPE_ATTENTION)]
)
def test_carried_state_reads_on_where_the_step_before_ended(preset, settings):
    config = nj.run_preset(preset, settings, length=16, batch=4, order="contiguous")
    built = run.build(config)
    state = run.new_state(config, built, run.optimizer(config, built.model)[0])
    tokens = jax.random.randint(jax.random.key(0), (4, 49), 0, 256)
    pieces = [tokens[:, i : i + 17] for i in (0, 16, 32)]

    def batch(piece):
        inside = piece[:, :-1]
        none = jnp.zeros(inside.shape, bool)
        return {"tokens": inside, "targets": piece[:, 1:], "mask": ~none, "resets": none}

    loss_fn = jax.jit(run.language_loss(built.definition))
    carry, losses = state.carry, []
    for piece in pieces:
        loss, (metrics, carry) = loss_fn(state.params, batch(piece), carry)
        losses.append(loss)
        assert int(metrics["tokens"]) == 64
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, state.carry)
    whole, _ = loss_fn(state.params, batch(tokens), None)
    np.testing.assert_allclose(np.mean(losses), whole, rtol=1e-5)
    fresh, _ = loss_fn(state.params, batch(pieces[2]), state.carry)
    assert abs(float(fresh) - float(losses[2])) > 1e-5  # what was carried matters


def test_masked_tokens_do_not_count():
    logits = jax.random.normal(jax.random.key(0), (1, 4, 8))
    targets = jnp.asarray([[1, 2, 3, 4]], jnp.int32)
    losses = run.token_losses(logits, targets)
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(losses[0], [-log_p[0, i, i + 1] for i in range(4)], rtol=1e-5)


def test_the_nested_system_says_which_boxes_are_the_optimizers():
    system = run.nested_system(nj.run_preset("hope_attention_nano"))
    assert {"matrix first moment", "cms.0 matrix second moment"} <= system.optimizer
    assert not {"attention", "embedding", "cms.0"} & system.optimizer
    period = {box.name: box.period for box in system.boxes}
    assert period["cms.3"] == period["cms.3 matrix first moment"] > period["embedding"] == 2048
    assert period["matrix every 20 first moment"] == 20 * 2048
