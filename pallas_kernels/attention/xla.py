"""JAX's attention as plain XLA operations: runs anywhere, stores T x S scores of each head."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.masks import Masks, visible, without_blanks


def attention_xla(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    masks: Masks,
    scale: float,
) -> Float[Array, "B T H K"]:
    """As the reference, with products in the dtype of the queries and a softmax in float32.

    Raises:
      NotImplementedError: float64, which the softmax would not keep.
    """
    if queries.dtype == jnp.float64:
        raise NotImplementedError(
            "implementation='xla' has its softmax in float32, not float64; use 'reference'"
        )
    length, total = queries.shape[1], keys.shape[1]
    seen = visible(masks, length, total)
    with jax.numpy_dtype_promotion("standard"):  # it promotes bfloat16 to its softmax's float32
        outputs = jax.nn.dot_product_attention(
            queries, keys, values, mask=seen, scale=scale, implementation="xla"
        )
    return without_blanks(outputs, masks, total)
