"""Updates: accumulation, the guard of a dispatch, evaluation, the optimizer, all against numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from nestedjax import training
from nestedjax.training.step import loss_and_gradients
from tests.training import toy


def grouped(batch, microbatches):
    return {k: v.reshape(microbatches, -1, *v.shape[1:]) for k, v in batch.items()}


def float64(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)


def test_accumulated_gradients_are_those_of_the_undivided_batch(x64):
    """With masks, so that the microbatches count for unequally many tokens."""
    params = float64(toy.make_state().params)
    batch = toy.ToyData(rows=8)[0]
    batch = {k: v if k == "mask" else v.astype(np.float64) for k, v in batch.items()}
    batch["mask"][:] = [1, 1, 1, 0, 0, 0, 1, 0]
    compute = jax.jit(loss_and_gradients, static_argnums=0)
    loss_fn = training.stateless(toy.mean_loss)
    whole = compute(loss_fn, params, grouped(batch, 1), None)
    parts = compute(loss_fn, params, grouped(batch, 4), None)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-12)
    assert int(parts[1]["tokens"]) == int(whole[1]["tokens"]) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), parts[3], whole[3])
    inner, outer = (np.asarray(params[name]) for name in ("inner", "outer"))
    x, y, mask = batch["tokens"], batch["targets"], batch["mask"]
    error = np.tanh(x @ inner) @ outer - y
    np.testing.assert_allclose(parts[0], np.mean(error[mask] ** 2), rtol=1e-12)
    expected = 2 * (np.tanh(x @ inner)[mask] * error[mask, None]).mean(0)
    np.testing.assert_allclose(parts[3]["outer"], expected, rtol=1e-12)


def test_a_carry_runs_through_each_row_of_microbatches():
    state = toy.make_state(microbatches=2)
    batch = jax.tree.map(jnp.asarray, grouped(toy.ToyData()[0], 2))
    _, _, carry, _ = jax.jit(loss_and_gradients, static_argnums=0)(
        toy.carried_loss, state.params, batch, state.carry
    )
    carried = jax.jit(toy.carried_loss)
    for i in range(2):
        alone = jax.tree.map(lambda a, i=i: a[i], (state.carry, batch))
        _, (_, expected) = carried(state.params, alone[1], alone[0])
        got = jax.tree.map(lambda a, i=i: a[i], carry)
        np.testing.assert_allclose(got["mean"], expected["mean"], rtol=1e-6)
        np.testing.assert_array_equal(
            jax.random.key_data(got["key"]), jax.random.key_data(expected["key"])
        )


def test_a_bad_step_and_all_after_it_change_nothing():
    dispatch = training.make_dispatch(toy.carried_loss, toy.TX)

    def stacked(bad):
        data = toy.ToyData(bad={1: bad})
        batches = [grouped(data[step], 1) for step in range(3)]
        return {k: jnp.stack([b[k] for b in batches]) for k in batches[0]}

    good = jnp.ones((), bool)
    after, healthy, metrics = dispatch(toy.make_state(), good, stacked(np.nan))
    assert not bool(healthy) and int(after.step) == 1
    assert np.isfinite(metrics["loss"][0]) and not np.isfinite(metrics["loss"][1])
    first = {k: v[:1] for k, v in stacked(1.0).items()}
    expected, healthy_once, _ = dispatch(toy.make_state(), good, first)
    assert bool(healthy_once)
    toy.assert_same_bits(after, expected)
    kept = toy.words(after)
    again, still, _ = dispatch(after, healthy, stacked(1.0))
    assert not bool(still)
    jax.tree.map(np.testing.assert_array_equal, toy.words(again), kept)


def test_evaluate_weighs_by_tokens():
    evaluate = training.make_evaluate(training.stateless(toy.mean_loss))
    params = toy.make_state().params
    batches = [toy.ToyData()[step] for step in range(3)]
    for batch, count in zip(batches, (1, 4, 2), strict=True):
        batch["mask"] = np.arange(4) < count
    found = evaluate(params, batches)
    assert found["tokens"] == 7
    inner, outer = (np.asarray(params[n].astype(jnp.float32)) for n in ("inner", "outer"))
    squares = [
        (np.tanh(b["tokens"] @ inner) @ outer - b["targets"])[b["mask"]] ** 2 for b in batches
    ]
    np.testing.assert_allclose(found["loss"], np.concatenate(squares).mean(), rtol=1e-5)
    plain = training.make_evaluate(training.stateless(lambda p, b: (jnp.mean(b), {})))
    assert plain(None, [jnp.ones(2), jnp.full(2, 4.0)]) == {"loss": 2.5}
