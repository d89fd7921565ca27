"""The scan chunk by chunk, with one state stored for each chunk.

A chunk is computed again in the backward pass, so that storage grows with the number of chunks and
not with that of tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.selective_scan.reference import selective_scan_reference


def selective_scan_xla(
    x: Float[Array, "*b T D"],
    step: Float[Array, "*b T D"],
    decay: Float[Array, "D N"],
    write: Float[Array, "*b T N"],
    read: Float[Array, "*b T N"],
    initial: Float[Array, "*b D N"],
    *,
    chunk_size: int,
    sequential: bool = False,
) -> tuple[Float[Array, "*b T D"], Float[Array, "*b D N"]]:
    """As the reference; the last chunk is padded with steps of zero, which change nothing.

    Args:
      chunk_size: tokens between two stored states.
      sequential: go through a chunk token by token. A CPU gains nothing from the associative scan,
        which writes the states of a chunk to memory 2 log2(chunk_size) times.
    """
    length = x.shape[-2]
    size = min(chunk_size, max(length, 1))
    chunks = -(-length // size)
    pad = [(0, 0)] * (x.ndim - 2) + [(0, chunks * size - length), (0, 0)]

    def split(a):
        a = jnp.pad(a, pad).reshape(*a.shape[:-2], chunks, size, a.shape[-1])
        return jnp.moveaxis(a, -3, 0)

    @jax.checkpoint
    def chunk(h, tokens):
        x, step, write, read = tokens
        if sequential:
            y, h = selective_scan_reference(x, step, decay, write, read, h)
            return h, y
        exponent = step[..., None] * decay.reshape((1,) * (step.ndim - 1) + decay.shape)
        added = (step * x)[..., None] * write[..., None, :]
        kept, added = jax.lax.associative_scan(_joined, (jnp.exp(exponent), added), axis=x.ndim - 2)
        states = kept * h[..., None, :, :] + added
        return states[..., -1, :, :], jnp.sum(states * read[..., None, :], axis=-1)

    final, y = jax.lax.scan(chunk, initial, tuple(split(a) for a in (x, step, write, read)))
    y = jnp.moveaxis(y, 0, -3)
    return y.reshape(*y.shape[:-3], chunks * size, y.shape[-1])[..., :length, :], final


def _joined(first, second):
    """Two stretches of `h -> kept h + added`, one after the other."""
    (kept, added), (kept_after, added_after) = first, second
    return kept * kept_after, kept_after * added + added_after
