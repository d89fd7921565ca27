"""Causal softmax attention over a sliding window, with a constant-size cache.

Non-parametric memory: its regression problem is solved anew for every query (period 0).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nestedjax.sharding import constrain
from pallas_kernels.numerics import accumulation_dtype


class AttentionState(NamedTuple):
    """What a sequence carries from call to call.

    Attributes:
      keys: rotated keys of the last `window` tokens, the newest at the right.
      values: their values.
      position: tokens seen since the start of the document.
    """

    keys: Float[Array, "B W H K"]
    values: Float[Array, "B W H K"]
    position: Int[Array, " B"]  # dtype=int32


def init_attention(
    batch: int, window: int, heads: int, head_dim: int, dtype: str
) -> AttentionState:
    """The state of `batch` sequences at the start of a context."""
    empty = jnp.zeros((batch, window, heads, head_dim), dtype)
    empty = constrain(empty, "batch", None, "heads", None)
    return AttentionState(empty, empty, constrain(jnp.zeros((batch,), jnp.int32), "batch"))


def rotary(
    x: Float[Array, "B T H K"], position: Int[Array, "B T"], *, theta: float = 1e4
) -> Float[Array, "B T H K"]:
    """Rotary position embedding: pairs (i, i + K/2) turn by position * theta^(-2i/K).

    Reference: Su et al., RoFormer (arXiv 2104.09864), in the half-split layout of Llama.
    """
    half = x.shape[-1] // 2
    wide = accumulation_dtype(x)
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle = position.astype(wide)[..., None] * frequency[None, None]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def positions(
    start: Int[Array, " B"], length: int, resets: Bool[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """Position in its document of each of `length` tokens, the first one at `start`.

    Example:
      >>> import jax.numpy as jnp
      >>> resets = jnp.array([[False, False, True, False]])
      >>> positions(jnp.array([5], jnp.int32), 4, resets)
      Array([[5, 6, 0, 1]], dtype=int32)
    """
    index = jnp.arange(length, dtype=jnp.int32)[None]
    since_start = start[:, None] + index
    if resets is None:
        return since_start
    last_reset = jax.lax.cummax(jnp.where(resets, index, -1), axis=1)
    return jnp.where(last_reset >= 0, index - last_reset, since_start)


def _attend(queries, keys, values, reach):
    """Softmax over the keys at most `reach` [B, T] places behind each query; keys end with them."""
    length, total = queries.shape[1], keys.shape[1]
    wide = accumulation_dtype(queries)
    scores = jnp.einsum("bthk,bshk->bhts", queries, keys, preferred_element_type=wide)
    query_index = jnp.arange(total - length, total, dtype=jnp.int32)
    distance = query_index[:, None] - jnp.arange(total, dtype=jnp.int32)[None]
    seen = (distance >= 0)[None] & (distance[None] <= reach[..., None])
    scores = scores * (queries.shape[-1] ** -0.5)
    scores = jnp.where(seen[:, None], scores, float(jnp.finfo(jnp.float32).min))
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bhts,bshk->bthk", weights, values)


def _attend_in_blocks(queries, keys, values, reach, window):
    """The same for many tokens in O(T * window): each block sees itself and the one before.

    `keys` and `values` begin with the `window` tokens before the first query.
    """
    length = queries.shape[1]
    blocks = -(-length // window)
    pad = blocks * window - length

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))

    def split(x):
        parts = padded(x).reshape(x.shape[0], blocks, window, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    keys, values = padded(keys), padded(values)

    @jax.checkpoint
    def block(_, inputs):
        index, query, behind = inputs
        near_keys = jax.lax.dynamic_slice_in_dim(keys, index, 2 * window, 1)
        near_values = jax.lax.dynamic_slice_in_dim(values, index, 2 * window, 1)
        return None, _attend(query, near_keys, near_values, behind)

    starts = jnp.arange(blocks, dtype=jnp.int32) * window
    _, outputs = jax.lax.scan(block, None, (starts, split(queries), split(reach)))
    outputs = jnp.moveaxis(outputs, 0, 1)
    return outputs.reshape(queries.shape[0], blocks * window, *queries.shape[2:])[:, :length]


def attention(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H K"],
    state: AttentionState | None = None,
    *,
    window: int,
    resets: Bool[Array, "B T"] | None = None,
    theta: float = 1e4,
) -> tuple[Float[Array, "B T H K"], AttentionState]:
    """Causal attention of T more tokens to the last `window` tokens of their own document.

    softmax_s(q_t . k_s / sqrt(K)) v_s over the s with t - window < s <= t in t's document; queries
    and keys are rotated by their position in it. Any split of a sequence into calls gives the same
    outputs; batch elements may stand at different positions.

    Args:
      queries: [B, T, H, K]; keys and values alike.
      state: None at the start of a context, when nothing is paid for the cache.
      window: how many tokens a token sees, itself included.
      resets: True at the first token of a new document.
      theta: base of the rotary frequencies.

    Returns:
      The outputs [B, T, H, K] and the state after them.
    """
    batch, length, heads, head_dim = queries.shape
    fresh = state is None
    if state is None:
        state = init_attention(batch, window, heads, head_dim, str(values.dtype))
    position = positions(state.position, length, resets)
    queries = rotary(queries, position, theta=theta)
    keys = rotary(keys, position, theta=theta)
    reach = jnp.minimum(position, window - 1)
    all_keys = jnp.concatenate([state.keys, keys], axis=1)
    all_values = jnp.concatenate([state.values, values], axis=1)
    if length > window:
        outputs = _attend_in_blocks(queries, all_keys, all_values, reach, window)
    elif fresh:
        outputs = _attend(queries, keys, values, reach)
    else:
        outputs = _attend(queries, all_keys, all_values, reach)
    after = AttentionState(all_keys[:, -window:], all_values[:, -window:], position[:, -1] + 1)
    return outputs, after
