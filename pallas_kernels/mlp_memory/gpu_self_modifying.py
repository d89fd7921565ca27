"""Self-modifying memories on a GPU, as an operation with a gradient; see `gpu_self`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_tiles import ROWS, as_parts, as_tiles, summed
from pallas_kernels.mlp_memory.chunk import unit
from pallas_kernels.mlp_memory.gpu_forward import Spec
from pallas_kernels.mlp_memory.gpu_self import backward, forward
from pallas_kernels.mlp_memory.types import FastWeights, Readout, Tokens

_INPUTS = ("x_keys", "x_values", "queries")


def self_modifying(
    spec: Spec,
    start: FastWeights,
    tokens: Tokens,
    readout: Readout,
    documents: dict[str, Any],
    whole: int,
) -> tuple[FastWeights, Any]:
    """The fast weights after the whole chunks and the reads, [H, d, whole]."""
    queries = unit(jnp.asarray(tokens.queries, jnp.float32))
    inputs = zip(_INPUTS, (tokens.keys, tokens.values, queries), strict=True)
    tiles = {name: as_tiles(a[..., :whole], spec.dtype) for name, a in inputs}
    biases = (jnp.broadcast_to(b[:, None], readout.rate.shape) for b in readout[2:])
    gates = jnp.stack([readout.rate, readout.keep, *biases], axis=1)
    spec = spec._replace(read=spec.rule.read)
    inner, outer, reads = _loop(spec, tiles, gates, documents, start.inner, start.outer)
    reads = jnp.swapaxes(reads.reshape(reads.shape[0], whole, ROWS), -1, -2)
    return FastWeights(inner, outer, None, None), reads


def _tokens(spec: Spec, tiles: dict, gates: Any, documents: dict) -> dict[str, Any]:
    return {n: as_parts(tiles[n], spec.parts) for n in _INPUTS} | {"readout": gates} | documents


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(spec: Spec, tiles: dict, gates: Any, documents: dict, inner: Any, outer: Any):
    """V and U after the last token and the reads."""
    return _loop_fwd(spec, tiles, gates, documents, inner, outer, keep_states=False)[0]


def _loop_fwd(spec, tiles, gates, documents, inner, outer, keep_states=True):
    given = _tokens(spec, tiles, gates, documents)
    found = forward(spec, given, inner, outer, keep_states=keep_states)
    results = found.pop("inner"), found.pop("outer"), summed(found.pop("reads"), spec.dtype)
    return results, (tiles, gates, documents, found)


def _loop_bwd(spec, kept, cotangents):
    tiles, gates, documents, kept = kept
    of_inner, of_outer, of_reads = cotangents
    given = _tokens(spec, tiles, gates, documents) | {"of_reads": as_parts(of_reads, spec.parts)}
    found = backward(spec, given, kept, of_inner, of_outer)
    of = {n: summed(found[n], jnp.float32) for n in (*_INPUTS, "rate", "keep")}
    # of q + U s(V q) the kernel pulls back the second term
    of["queries"] = of["queries"] + of_reads.astype(jnp.float32)
    weights = [jnp.sum(of[n], axis=(1, 2)) for n in ("rate", "keep")]
    biases = jnp.sum(found["gates"], axis=1)
    of_gates = jnp.concatenate([jnp.stack(weights, axis=1), biases], axis=1)
    of_tiles = {n: of[n].astype(spec.dtype) for n in _INPUTS}
    of_documents = {n: found.get(n, jnp.zeros_like(a)) for n, a in documents.items()}
    return of_tiles, of_gates, of_documents, found["inner"], found["outer"]


_loop.defvjp(_loop_fwd, _loop_bwd)
