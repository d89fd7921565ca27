"""Causal softmax attention over a sliding window, with a constant-size cache.

Non-parametric memory: its regression problem is solved anew for every query (period 0).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nestedjax.sharding import constrain
from pallas_kernels import accumulation_dtype
from pallas_kernels.attention import attention as softmax_attention
from pallas_kernels.attention import default_implementation


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


def _attend_in_blocks(queries, keys, values, documents, window):
    """For many tokens in O(T * window): each block sees itself and the one before.

    `keys`, `values` and their document numbers begin with the `window` tokens before the first
    query.
    """
    length = queries.shape[1]
    blocks = -(-length // window)
    pad = blocks * window - length

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))

    def split(x):
        parts = padded(x).reshape(x.shape[0], blocks, window, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    keys, values, of_keys = (padded(x) for x in (keys, values, documents[1]))

    @jax.checkpoint
    def block(_, inputs):
        index, query, of_query = inputs
        near = [
            jax.lax.dynamic_slice_in_dim(x, index, 2 * window, 1) for x in (keys, values, of_keys)
        ]
        pair = (of_query, near[2])
        return None, softmax_attention(query, *near[:2], window=window, documents=pair)

    starts = jnp.arange(blocks, dtype=jnp.int32) * window
    _, outputs = jax.lax.scan(block, None, (starts, split(queries), split(documents[0])))
    outputs = jnp.moveaxis(outputs, 0, 1)
    return outputs.reshape(queries.shape[0], blocks * window, *queries.shape[2:])[:, :length]


def _in_one_kernel(queries, keys, values, window, documents) -> bool:
    """Whether a kernel attends to more tokens than the window at the cost of the window.

    cuDNN takes documents only as a mask of T x T numbers, and then computes them all.
    """
    how = default_implementation(queries, keys, values, window=window, documents=documents)
    return how == "pallas_tpu" or (how == "cudnn" and documents is None)


def _documents(
    position: Int[Array, " B"], length: int, window: int, resets: Bool[Array, "B T"] | None
) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """Numbers of the documents of the queries, and of the `window` cached keys and theirs.

    The ongoing document is 0, what the cache holds from before it, or not at all yet, is -1.
    """
    age = jnp.arange(window, 0, -1, dtype=jnp.int32)[None]
    cached = jnp.where(age <= position[:, None], 0, -1)
    if resets is None:
        queries = jnp.zeros((cached.shape[0], length), jnp.int32)
        queries = constrain(queries, "batch", None)
    else:
        queries = jnp.cumsum(resets, axis=1, dtype=jnp.int32)
    return queries, jnp.concatenate([cached, queries], axis=1)


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
    all_keys = jnp.concatenate([state.keys, keys], axis=1)
    all_values = jnp.concatenate([state.values, values], axis=1)
    documents = _documents(state.position, length, window, resets)
    packed = None if resets is None else documents[0]
    if fresh and (length <= window or _in_one_kernel(queries, keys, values, window, packed)):
        outputs = softmax_attention(queries, keys, values, window=window, documents=packed)
    elif length > window:
        outputs = _attend_in_blocks(queries, all_keys, all_values, documents, window)
    else:
        outputs = softmax_attention(
            queries, all_keys, all_values, window=window, documents=documents
        )
    after = AttentionState(all_keys[:, -window:], all_values[:, -window:], position[:, -1] + 1)
    return outputs, after
