"""Sampling: one token after another through a recurrent model, with a state of constant size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

PyTree = Any
Step = Callable[[Any, PyTree], tuple[Array, PyTree]]

# Far above the smallest number of float32, and so low that only exact ties would be drawn between.
GREEDY = 1e-30


def generate(
    step: Step,
    state: PyTree,
    prompt: Int[Array, "B T"],
    *,
    tokens: int,
    key: Array,
    temperature: float | int = 1.0,
    top_k: int | None = None,
) -> tuple[Int[Array, "B N"], PyTree]:
    """Continue a prompt: one call over all of it but its last token, then one scan over tokens.

    Meant to be called inside `jax.jit`; memory does not grow with the number of tokens.

    Args:
      step: `step(tokens[B, T], state) -> (logits[B, T, V], state)`, such as a model.
      state: at the start of the prompt.
      prompt: at least one token.
      tokens: N, how many to draw.
      key: random key.
      temperature: 0 takes the most likely token, and so does anything below 1e-30.
      top_k: draw among the k most likely tokens only.

    Returns:
      The new tokens int32[B, N], and the state after all but the last of them.

    Raises:
      ValueError: an empty prompt, no token asked for, a top_k below 1, or a temperature that is
        negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def count(tokens, state):  # the next number follows, whatever the state
      ...     return jax.nn.one_hot((tokens + 1) % 5, 5) * 100, state
      >>> prompt = jnp.asarray([[3]], jnp.int32)
      >>> generate(count, None, prompt, tokens=4, key=jax.random.key(0))[0].tolist()
      [[4, 0, 1, 2]]
    """
    if prompt.shape[1] < 1 or tokens < 1:
        raise ValueError(f"prompt {prompt.shape}, tokens={tokens}: both need at least one token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 or more, and finite")

    def pick(logits, draw):
        if temperature < GREEDY:
            return logits.argmax(-1).astype(jnp.int32)
        if top_k is not None and top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        # Where one uniform number falls: one for each token of the vocabulary (as `categorical`
        # draws them) would cost as much as a small model does.
        # The largest is 0 before the division: behind it, what rounding leaves of the largest minus
        # itself (the compiler fuses both) would overflow at small temperatures.
        logits = logits - logits.max(-1, keepdims=True)
        shares = jax.nn.softmax(logits / jnp.asarray(temperature, logits.dtype))
        ends = jnp.cumsum(shares, axis=-1)
        reached = draw.astype(ends.dtype)[:, None] * ends[:, -1:]
        return jnp.sum(ends < reached, axis=-1, dtype=jnp.int32)

    def body(carried, draw):
        token, state = carried
        logits, state = step(token[:, None], state)
        token = pick(logits[:, -1], draw)
        return (token, state), token

    # The prompt's last token goes through the scan, too: one token is one program, compiled once.
    if prompt.shape[1] > 1:
        _, state = step(prompt[:, :-1], state)
    start = prompt[:, -1].astype(jnp.int32), state
    draws = 1.0 - jax.random.uniform(key, (tokens, prompt.shape[0]), jnp.float32)  # in (0, 1]
    (_, state), drawn = jax.lax.scan(body, start, draws)
    return drawn.swapaxes(0, 1), state
