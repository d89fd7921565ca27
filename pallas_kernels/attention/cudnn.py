"""cuDNN's flash attention, through JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.masks import Masks, visible, without_blanks


def attention_cudnn(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    masks: Masks,
    scale: float,
) -> Float[Array, "B T H K"]:
    """As the reference, for float16 and bfloat16.

    Causality and a causal window over keys as long as the queries are cuDNN's own and cost no
    memory. Everything else is handed over as a mask, T x S numbers for each sequence.

    Raises:
      NotImplementedError: a workload that cuDNN does not take.
    """
    reason = refusal(queries, keys, masks)
    if reason is not None:
        raise NotImplementedError(reason)
    length, total = queries.shape[1], keys.shape[1]
    own = _is_own(masks, length, total)
    window = masks.window if own else None
    outputs = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        mask=None if own else visible(masks, length, total),
        scale=scale,
        is_causal=own and masks.causal,
        # it counts the tokens to the left, without the query itself
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return without_blanks(outputs, masks, total)


def _is_own(masks: Masks, length: int, total: int) -> bool:
    """Whether cuDNN knows this mask: it counts causality from the first key, windows with it."""
    if masks.prefix is not None or masks.documents is not None:
        return False
    if masks.window is not None and not masks.causal:
        return False
    return length == total or not masks.causal


def refusal(queries: Array, keys: Array, masks: Masks) -> str | None:
    """Why cuDNN does not take this workload; None where it does."""
    if queries.dtype not in (jnp.float16, jnp.bfloat16):
        return f"cuDNN's attention takes float16 and bfloat16, not {queries.dtype}"
    width, most = queries.shape[-1], _widest()
    if width % 8 or width > most:
        return f"cuDNN's attention takes heads of a multiple of 8 up to {most}, not {width}"
    length, total = queries.shape[1], keys.shape[1]
    if (length % 2 or total % 2) and not _is_own(masks, length, total):
        return f"cuDNN's attention takes masks of even lengths, not {length} x {total}"
    return None


def _widest() -> int:
    """Features of a head that this process's first device takes: more from Hopper on."""
    device = jax.devices()[0]
    return 256 if device.platform == "gpu" and float(device.compute_capability) >= 9 else 128
