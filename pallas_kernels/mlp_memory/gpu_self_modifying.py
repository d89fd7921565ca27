"""Self-modifying memories on a GPU, as an operation with a gradient; see `gpu_self`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._gpu.tiles import ROWS, as_parts, as_tiles, summed
from pallas_kernels.delta_rule.gpu_vectors import logs_of
from pallas_kernels.mlp_memory.anchor import unit
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
    offsets = (readout.learning_rate_bias, readout.decay_bias)
    biases = (jnp.broadcast_to(b[:, None], readout.learning_rate.shape) for b in offsets)
    gates = jnp.stack([readout.learning_rate, readout.decay, *biases], axis=1)
    spec = spec._replace(read=spec.rule.read)
    momentum = None
    if spec.momentum:
        gate = jnp.asarray(tokens.momentum, jnp.float32)[:, :whole]
        momentum = logs_of(gate.reshape(-1, whole // ROWS, ROWS))
    matrices = tuple(a for a in start if a is not None)
    last, reads = _loop(spec, tiles, gates, momentum, documents, matrices)
    reads = jnp.swapaxes(reads.reshape(reads.shape[0], whole, ROWS), -1, -2)
    return FastWeights(*last, *(None,) * (4 - len(last))), reads


def _tokens(spec: Spec, tiles: dict, gates: Any, momentum, documents: dict) -> dict[str, Any]:
    made = {n: as_parts(tiles[n], spec.parts) for n in _INPUTS} | {"readout": gates} | documents
    if momentum is None:
        return made
    at = jnp.cumsum(momentum, axis=-1)
    end = jnp.broadcast_to(at[..., -1:], at.shape)
    return made | {"momentum": jnp.stack([at, end - at, end], axis=-2)}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop(spec: Spec, tiles: dict, gates: Any, momentum: Any, documents: dict, matrices: tuple):
    """The matrices after the last token and the reads; `momentum` is logarithms or None."""
    return _loop_fwd(spec, tiles, gates, momentum, documents, matrices, keep_states=False)[0]


def _loop_fwd(spec, tiles, gates, momentum, documents, matrices, keep_states=True):
    given = _tokens(spec, tiles, gates, momentum, documents)
    found = forward(spec, given, matrices, keep_states=keep_states)
    last = tuple(found.pop(name) for name in spec.matrices)
    reads = summed(found.pop("reads"), spec.dtype)
    return (last, reads), (tiles, gates, momentum, documents, found)


def _loop_bwd(spec, kept, cotangents):
    tiles, gates, momentum, documents, kept = kept
    of_matrices, of_reads = cotangents
    given = _tokens(spec, tiles, gates, momentum, documents)
    given |= {"of_reads": as_parts(of_reads, spec.parts)}
    found = backward(spec, given, kept, of_matrices)
    of = {n: summed(found[n], jnp.float32) for n in (*_INPUTS, "learning_rate", "decay")}
    # of q + U s(V q) the kernel pulls back the second term
    of["queries"] = of["queries"] + of_reads.astype(jnp.float32)
    weights = [jnp.sum(of[n], axis=(1, 2)) for n in ("learning_rate", "decay")]
    biases = jnp.sum(found["gates"][:, :, :2], axis=1)
    of_gates = jnp.concatenate([jnp.stack(weights, axis=1), biases], axis=1)
    of_tiles = {n: of[n].astype(spec.dtype) for n in _INPUTS}
    of_documents = {n: found.get(n, jnp.zeros_like(a)) for n, a in documents.items()}
    of_momentum = None if momentum is None else found["gates"][:, :, 2]
    of_matrices = tuple(found[name] for name in spec.matrices)
    return of_tiles, of_gates, of_momentum, of_documents, of_matrices


_loop.defvjp(_loop_fwd, _loop_bwd)
