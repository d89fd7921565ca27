"""One dispatch to the device: several guarded updates, each over several microbatches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestedjax.optim import gradient_norm
from nestedjax.training.state import PyTree, TrainState
from pallas_kernels import accumulation_dtype

Metrics = dict[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, tuple[Metrics, PyTree]]]
Batch = dict[str, Any]

TOKENS = "tokens"  # the metric that says how many tokens a loss is the mean over


def stateless(loss: Callable[..., tuple[jax.Array, Metrics]]) -> LossFn:
    """Turn `(params, batch) -> (loss, metrics)` into the loop's signature, which carries state.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = stateless(lambda params, batch: (jnp.sum(params * batch), {}))
      >>> loss_fn(jnp.ones(2), jnp.ones(2), None)
      (Array(2., dtype=float32), ({}, None))
    """

    def loss_fn(params, batch, carry):
        value, metrics = loss(params, batch)
        return value, (metrics, carry)

    return loss_fn


def loss_and_gradients(
    loss_fn: LossFn, params: PyTree, batches: Batch, carry: PyTree
) -> tuple[jax.Array, Metrics, PyTree, PyTree]:
    """Loss, metrics, carry and gradients of one step, over its microbatches.

    With weights n_i = `metrics["tokens"]` (1 if the loss gives none), the step's loss is
    sum_i n_i loss_i / sum_i n_i, which is the loss of the undivided batch when each loss_i is a
    mean over n_i tokens; so are gradients and metrics. `tokens` itself is summed.

    Args:
      loss_fn: `loss_fn(params, batch, carry) -> (loss, (metrics, carry))`, metrics scalars.
      params: slow parameters.
      batches: arrays [M, B / M, ...], M microbatches.
      carry: leaves [M, ...] if M > 1.

    Returns:
      Loss, metrics, the new carry, gradients in the dtypes of `params`.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    count = jax.tree.leaves(batches)[0].shape[0]
    if count == 1:
        batch = jax.tree.map(lambda x: x[0], batches)
        (loss, (metrics, carry)), gradients = gradient(params, batch, carry)
        return loss, metrics, carry, gradients

    def scaled(tree, weight):
        def scale(x):
            wide = accumulation_dtype(x)
            return x.astype(wide) * weight.astype(wide)

        return jax.tree.map(scale, tree)

    def weighted(batch, carry):
        (loss, (metrics, carry)), gradients = gradient(params, batch, carry)
        means = {key: value for key, value in metrics.items() if key != TOKENS}
        weight = jnp.asarray(metrics.get(TOKENS, 1), jnp.float32)
        return (scaled(((loss, means), gradients), weight), weight, metrics.get(TOKENS)), carry

    def body(total, inputs):
        part, carry = weighted(*inputs)
        return jax.tree.map(jnp.add, total, part), carry

    first = jax.tree.map(lambda x: x[0], (batches, carry))
    shapes, _ = jax.eval_shape(weighted, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # Gradients accumulate where their parameters lie; eval_shape alone forgets shardings.
    zeros = _with_gradients_like(zeros, params)
    (sums, weight, tokens), carry = jax.lax.scan(body, zeros, (batches, carry))
    (loss, means), gradients = scaled(sums, 1 / jnp.maximum(weight, 1))
    metrics = means if tokens is None else {**means, TOKENS: tokens}
    gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params)
    return loss, metrics, carry, gradients


def make_dispatch(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    learning_rate: Callable[[jax.Array], Any] | None = None,
    shardings: TrainState | None = None,
) -> Callable[..., tuple[TrainState, jax.Array, Metrics]]:
    """Compile several steps into one dispatch.

    A step whose loss, gradient norm, update or carry is not finite changes nothing. Nor do the
    steps after it, in this dispatch and in every later one that is given its `healthy`.

    Args:
      loss_fn: see `loss_and_gradients`.
      tx: the optimizer.
      learning_rate: schedule to record, a function of the step; it is `tx` that applies it.
      shardings: of the state, to hold from dispatch to dispatch; default: left to the compiler.

    Returns:
      `dispatch(state, healthy, batches) -> (state, healthy, metrics)`; `batches` are arrays
      [K, M, B / M, ...] (K steps of M microbatches), `healthy` a bool[], metrics arrays [K]. The
      state given is donated.
    """

    def one(carried, batches):
        state, healthy = carried
        loss, metrics, carry, gradients = loss_and_gradients(
            loss_fn, state.params, batches, state.carry
        )
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        norm = gradient_norm(gradients)
        metrics = {"loss": loss, "grad_norm": norm, **metrics}
        if learning_rate is not None:
            metrics["learning_rate"] = jnp.asarray(learning_rate(state.step))
        finite = [loss, norm, optax.tree.norm(updates), *_inexact(carry)]
        healthy = jnp.stack([healthy, *(jnp.isfinite(x).all() for x in finite)]).all()
        new = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            key=state.key,
            carry=carry,
        )
        state = jax.tree.map(lambda new, old: jnp.where(healthy, new, old), new, state)
        return (state, healthy), metrics

    def dispatch(state, healthy, batches):
        (state, healthy), metrics = jax.lax.scan(one, (state, healthy), batches)
        return state, healthy, metrics

    placed = None if shardings is None else (shardings, None, None)
    return jax.jit(dispatch, donate_argnums=0, out_shardings=placed)


def make_evaluate(loss_fn: LossFn) -> Callable[[PyTree, Iterable[Batch]], dict[str, float]]:
    """Compile a validation pass.

    Returns:
      `evaluate(params, batches) -> metrics`: the means over all tokens of `loss` and of the loss
      function's metrics, and the number of `tokens`. Each batch starts fresh contexts (the carry
      is None).
    """

    @jax.jit
    def losses(params, batch):
        loss, (metrics, _) = loss_fn(params, batch, None)
        return {"loss": loss, **metrics}

    def evaluate(params, batches):
        parts = jax.device_get([losses(params, batch) for batch in batches])
        weights = np.array([part.get(TOKENS, 1) for part in parts], np.float64)
        total = max(weights.sum(), 1.0)
        means = {
            key: float(sum(w * float(part[key]) for w, part in zip(weights, parts, strict=True)))
            / total
            for key in parts[0]
            if key != TOKENS
        }
        return {**means, TOKENS: int(weights.sum())} if TOKENS in parts[0] else means

    return evaluate


def _inexact(tree: PyTree) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _with_gradients_like(zeros: PyTree, params: PyTree) -> PyTree:
    (scalars, gradients), *rest = zeros
    gradients = jax.tree.map(lambda g, p: jnp.zeros_like(p, dtype=g.dtype), gradients, params)
    return ((scalars, gradients), *rest)
