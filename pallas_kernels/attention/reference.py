"""Attention as it is written: scores, softmax, sum; the oracle of the others.

On a CPU it is also the fastest: XLA copies scores with an axis for the queries of a key head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._linalg.numerics import accumulation_dtype
from pallas_kernels.attention.masks import Masks, visible, without_blanks


def attention_reference(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    masks: Masks,
    scale: float,
) -> Float[Array, "B T H K"]:
    """`softmax_s(scale q_t . k_s) v_s` over the keys seen, all in at least float32."""
    length, total, share = queries.shape[1], keys.shape[1], queries.shape[2] // keys.shape[2]
    wide = accumulation_dtype(queries)
    q, k, v = (a.astype(wide) for a in (queries, keys, values))
    if share > 1:
        k, v = (jnp.repeat(a, share, axis=2) for a in (k, v))
    scores = scale * jnp.einsum("bthk,bshk->bhts", q, k)
    seen = visible(masks, length, total)
    if seen is not None:
        scores = jnp.where(seen, scores, float(jnp.finfo(jnp.float32).min))
    outputs = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), v)
    return without_blanks(outputs, masks, total).astype(queries.dtype)
