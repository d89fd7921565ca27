"""JAX's splash attention on a TPU: scores stay in VMEM, blocks that are masked are skipped."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float

from pallas_kernels.attention.masks import Masks, in_reach, without_blanks

LANES = 128  # lengths are filled up to whole blocks of at least as many tokens
_BLOCKS = (512, 256, LANES)


class _Reach(splash.Mask):
    """The mask of `in_reach`, computed inside the kernel from positions.

    A query that only pads a block may see no key. Its outputs are dropped, so that no gradient
    comes back from it. Its block also holds a real query, which keeps the softmax finite.
    """

    def __init__(self, masks: Masks, lengths: tuple[int, int], padded: tuple[int, int]):
        length, total = lengths
        self._shape = padded
        self._key = (masks.causal, masks.window, masks.prefix, lengths, padded)
        self.q_sequence = np.arange(padded[0], dtype=np.int32) + np.int32(total - length)
        self.mask_function = self._sees

    def _sees(self, position: Any, key: Any) -> Any:
        causal, window, prefix, (_, total), (_, columns) = self._key
        seen = in_reach(position, key, causal, window, prefix)
        if seen is None:
            return key < total
        return seen if total == columns else seen & (key < total)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def __getitem__(self, index) -> np.ndarray:
        rows, columns = index
        positions = self.q_sequence[rows, None]
        keys = np.arange(self._shape[1], dtype=np.int32)[None, columns]
        seen = self._sees(positions, keys)
        return np.broadcast_to(seen, (positions.shape[0], keys.shape[1]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reach) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def attention_pallas_tpu(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    masks: Masks,
    scale: float,
    *,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """As the reference; queries are scaled in their own dtype before the kernel.

    Args:
      queries: padded with zeros to whole blocks, as are keys and values.
      block: tokens of a block, a multiple of 128; None: the largest that divides the length.
      interpret: run on the CPU, for tests.

    Raises:
      NotImplementedError: a dtype or a prefix that the kernel does not take.
    """
    reason = refusal(queries, masks)
    if reason is not None:
        raise NotImplementedError(reason)
    length, total = queries.shape[1], keys.shape[1]
    padded = _whole(length, block), _whole(total, block)
    heads = queries.shape[2]
    mask = splash.MultiHeadMask([_Reach(masks, (length, total), padded)] * heads)
    kernel = splash.make_splash_mha_single_device(
        mask, block_sizes=_blocks(*padded, block), interpret=interpret
    )
    scaled = queries * jnp.asarray(scale, queries.dtype)
    q = _filled(scaled, padded[0]).swapaxes(1, 2)
    k, v = (_filled(a, padded[1]).swapaxes(1, 2) for a in (keys, values))
    if masks.documents is None:
        outputs = jax.vmap(kernel)(q, k, v)
    else:
        of_queries, of_keys = masks.documents
        segments = splash.SegmentIds(_filled(of_queries, padded[0]), _filled(of_keys, padded[1]))
        outputs = jax.vmap(kernel)(q, k, v, segments)
    outputs = outputs.swapaxes(1, 2)[:, :length]
    return without_blanks(outputs, masks, total)


def refusal(queries: Array, masks: Masks) -> str | None:
    """Why the kernel does not take this workload; None where it does."""
    if queries.dtype not in (jnp.float32, jnp.bfloat16):
        return f"splash attention takes float32 and bfloat16, not {queries.dtype}"
    if masks.prefix is not None and not isinstance(masks.prefix, int):
        return "splash attention takes one prefix for all sequences, an int; use 'xla'"
    return None


def _whole(length: int, block: int | None) -> int:
    block = LANES if block is None else block
    return -(-length // block) * block


def _filled(array: Array, length: int) -> Array:
    pad = [(0, 0)] * array.ndim
    pad[1] = (0, length - array.shape[1])
    return jnp.pad(array, pad)


def _blocks(length: int, total: int, block: int | None):
    sizes = _BLOCKS if block is None else (block,)
    rows, columns = (next(size for size in sizes if n % size == 0) for n in (length, total))
    return splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
