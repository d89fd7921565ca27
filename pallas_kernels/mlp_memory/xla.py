"""Whole sequences of a deep memory in plain jnp: a scan over chunks."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._linalg.products import INVERSE
from pallas_kernels.mlp_memory.context import memory_chunk, restarted
from pallas_kernels.mlp_memory.types import Documents, FastWeights, Readout, Rule, Tokens


def recomputed(chunk):
    """`chunk`, recomputed from its first state in the backward pass, but for the named inverses."""
    return jax.checkpoint(chunk, policy=jax.checkpoint_policies.save_only_these_names(INVERSE))


def mlp_memory_xla(
    start: FastWeights,
    tokens: Tokens,
    readout: Readout | None,
    documents: Documents | None = None,
    begin: FastWeights | None = None,
    *,
    rule: Rule,
    chunk_size: int,
) -> tuple[Float[Array, "H d T"] | None, FastWeights]:
    """A scan over chunks, each recomputed in the backward pass; operands have one leading axis.

    The tokens beyond the last whole chunk run as a shorter chunk of their own.
    """

    @recomputed
    def chunk(state, part, begins, documents, readout, begin):
        if documents is not None:
            begins = begins[:, None, None, None]
            state = restarted(state, begins, documents.inner, documents.outer)
        return memory_chunk(state, part, readout, rule, start=begin)

    begins = None if documents is None else documents.begins.T
    length = tokens.keys.shape[-1]
    whole = length // chunk_size * chunk_size
    state, pieces = start, []
    if whole:
        parts = jax.tree.map(partial(_chunks, whole=whole, size=chunk_size), tokens)
        scanned = (parts, None if begins is None else begins[: whole // chunk_size])
        state, reads = jax.lax.scan(
            lambda state, x: chunk(state, *x, documents, readout, begin), state, scanned
        )
        if reads is not None:
            reads = jnp.moveaxis(reads, 0, -2)
            pieces.append(reads.reshape(*reads.shape[:-2], whole))
    if whole < length:
        part = jax.tree.map(lambda a: a[..., whole:], tokens)
        state, reads = chunk(
            state, part, None if begins is None else begins[-1], documents, readout, begin
        )
        if reads is not None:
            pieces.append(reads)
    return jnp.concatenate(pieces, axis=-1) if pieces else None, state


def _chunks(array, *, whole: int, size: int):
    array = array[..., :whole]
    return jnp.moveaxis(array.reshape(*array.shape[:-1], -1, size), -2, 0)
