"""What a run computes, as functions of parameters: loss, samples, and where numbers break."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nestedjax import levels, models
from nestedjax.errors import ConfigError
from nestedjax.evaluation import generate
from nestedjax.training import LossFn

PyTree = Any
Loss = Callable[[jax.Array, dict[str, jax.Array]], jax.Array]

PIECE = 256  # tokens of a prompt read at once, rounded up to whole chunks


def language_loss(definition: models.Definition, loss: Loss | None = None) -> LossFn:
    """The training loss of the model that `definition` describes.

    Args:
      definition: of a model.
      loss: `loss(logits, batch) -> losses`, [B, T, V] to [B, T]; default `token_losses`: next-token
        cross-entropy in nats per token.

    Returns:
      `loss_fn(params, batch, carry) -> (loss, ({"tokens": n}, carry))`, the mean over the n tokens
      of `batch["mask"]`, or over all. A carry is the model's state after the step before, on a
      boundary of its chunks (`levels.at_boundary`); gradients end there.
    """

    def loss_fn(params, batch, carry):
        model = models.merge(definition, params)
        state = None if carry is None else jax.lax.stop_gradient(carry)
        logits, state = model(batch["tokens"], state, resets=batch.get("resets"))
        targets = batch["targets"]
        losses = token_losses(logits, targets) if loss is None else loss(logits, batch)
        _require_losses(losses, targets)
        mask = batch.get("mask", jnp.ones(targets.shape, bool))
        count = mask.sum(dtype=jnp.int32)
        weight = 1 / jnp.maximum(count, 1).astype(losses.dtype)
        total = jnp.where(mask, losses, 0.0).sum() * weight
        return total, ({"tokens": count}, None if carry is None else levels.at_boundary(state))

    return loss_fn


def _require_losses(losses: Any, targets: jax.Array) -> None:
    """Refuse what a loss of the user's own returned, if it is not the loss of each target."""
    found = f"{type(losses).__name__}"
    if isinstance(losses, jax.Array):
        found = f"{losses.dtype}{list(losses.shape)}"
        if losses.shape == targets.shape and jnp.issubdtype(losses.dtype, jnp.floating):
            return
    raise ConfigError(
        f"the loss returned {found}; return the loss of each target, floating-point"
        f" {list(targets.shape)} here: their mean over the mask is what is trained"
    )


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) of each token, in nats.

    Args:
      logits: [B, T, V].
      targets: int32 [B, T].
    """
    # A masked sum and not an index: it also runs over a vocabulary that a mesh has split.
    vocab = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    picked = jnp.where(vocab[None, None] == targets[..., None], logits, 0.0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def sampler(
    definition: models.Definition,
    *,
    tokens: int,
    temperature: float | int = 0.8,
    top_k: int | None = None,
    settle: bool = False,
) -> Callable[[PyTree, np.ndarray, jax.Array], np.ndarray]:
    """Compile the continuation of a prompt; memory grows with neither prompt nor continuation.

    Args:
      definition: of a model; with `settle` of a `models.InContextModel`.
      tokens: how many to draw.
      temperature: see `nestedjax.evaluation.generate`.
      top_k: see there.
      settle: learn from the prompt but not from what is drawn after it.

    Returns:
      `draw(params, prompt, key) -> tokens`, a prompt int[T] to int32[tokens].
    """

    def start(params):
        return models.merge(definition, params).init_state(1)

    def read(params, state, piece):
        model = models.merge(definition, params)
        if not isinstance(model, models.InContextModel):  # whose last write waits for what follows
            state = levels.at_boundary(state)  # so that whole chunks take the fast path
        return model(piece[None], state)[1]

    def go_on(params, state, prompt, key):
        model = models.merge(definition, params)
        options = {"tokens": tokens, "key": key, "temperature": temperature, "top_k": top_k}
        if not settle:
            return generate(model, state, prompt[None], **options)[0][0]
        assert isinstance(model, models.InContextModel)
        return generate(model.read, model.settle(state), prompt[None], **options)[0][0]

    start, read, go_on = jax.jit(start), jax.jit(read), jax.jit(go_on)

    def draw(params, prompt, key):
        state, prompt = start(params), jnp.asarray(prompt, jnp.int32)
        period = models.merge(definition, params).config.period
        size = -(-PIECE // period) * period  # every piece begins where a chunk does
        for first in range(0, prompt.size - 1, size):
            state = read(params, state, prompt[first : min(first + size, prompt.size - 1)])
        return np.asarray(go_on(params, state, prompt[-1:], key))

    return draw


def probe(definition: models.Definition) -> Callable[[PyTree, PyTree], dict[str, PyTree]]:
    """What the training loop asks where a number ceased to be finite."""

    @jax.jit
    def activations(params, batch):
        return models.merge(definition, params).probe(batch["tokens"], resets=batch.get("resets"))

    def in_order(params, batch):
        found = activations(params, batch)
        # A dict comes out of jit sorted by key; the model's own order is that of cause and effect.
        return {name: found[name] for name in probe_names(definition, params, batch)}

    return in_order


def probe_names(definition: models.Definition, params: PyTree, batch: PyTree) -> list[str]:
    """The names of a probe's activations in the order in which they are computed."""
    names: list[str] = []

    def record(params, batch):
        names.extend(
            models.merge(definition, params).probe(batch["tokens"], resets=batch.get("resets"))
        )

    jax.eval_shape(record, params, batch)
    return names
