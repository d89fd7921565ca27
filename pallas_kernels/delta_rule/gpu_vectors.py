"""The numbers of a chunk's tokens that the GPU kernels take, and the gradients that come back.

Decays travel as log sums of `keep`: the kernels take exponentials of their differences.
"""

import jax.numpy as jnp

from pallas_kernels.delta_rule.gpu_chunk import VECTORS


def logs_of(keep):
    """The logarithms of the keep gate; log 0 would give inf - inf in the sums."""
    return jnp.log(jnp.maximum(keep, jnp.finfo(jnp.float32).tiny))


def log_sums(logs):
    """The last four of `VECTORS`, each [..., 64], from the logs of keep of whole chunks."""
    at = jnp.cumsum(logs, axis=-1)
    total = jnp.broadcast_to(at[..., -1:], at.shape)
    return {"at": at, "before": _shifted(at), "tail": at[..., -1:] - at, "total": total}


def stacked(made, names=VECTORS):
    """A dict of vectors [S, N, 64] as [S, N, names, 64], zeros for those it lacks."""
    return jnp.stack([made.get(n, jnp.zeros_like(made["rate"])) for n in names], axis=-2)


def of_logs(of, *, erase: bool, read: str | None):
    """The gradient of the logs of keep [S, N, 64].

    Args:
      of: the gradients of `log_sums` and of "pairs", each [S, N, 64].
      erase: whether the memory erases; then "before" and "pairs" were given.
      read: "running_prev", "running" or None.
    """
    total = of["pairs"] if read or erase else jnp.zeros_like(of["tail"])
    total = total + jnp.sum(of["total"], axis=-1, keepdims=True)
    total = total + _earlier(of["tail"])
    if read == "running":
        total = total + _later(of["at"]) + of["at"]
    if read == "running_prev" or erase:
        total = total + _later(of["before"])
    return total


def _shifted(array):
    """Each token's number at the next one, 0 at the first."""
    return jnp.pad(array[..., :-1], [(0, 0)] * (array.ndim - 1) + [(1, 0)])


def _earlier(array):
    """Sums over the tokens before each."""
    return _shifted(jnp.cumsum(array, axis=-1))


def _later(array):
    return jnp.flip(_earlier(jnp.flip(array, axis=-1)), axis=-1)
