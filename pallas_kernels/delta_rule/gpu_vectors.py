"""The numbers of a chunk's tokens that the GPU kernels take, and the gradients that come back.

Decays are handed over as running sums of their logarithms, of whose differences the kernels take
exponentials.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule import gpu_momentum
from pallas_kernels.delta_rule.gpu_chunk import VECTORS


def logs_of(decay):
    """The logarithms of the decay gate; log 0 would give inf - inf in the sums, < 0 gives nan."""
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.log(jnp.where(jnp.abs(decay) < tiny, tiny, decay))


def log_sums(logs):
    """The last four of `VECTORS`, each [..., 64], from the logs of decay of whole chunks."""
    at = jnp.cumsum(logs, axis=-1)
    total = jnp.broadcast_to(at[..., -1:], at.shape)
    return {"at": at, "before": _shifted(at), "tail": at[..., -1:] - at, "total": total}


def momentum_sums(decay, momentum):
    """`gpu_momentum.VECTORS`, each [..., 64], from the logs of decay and of momentum.

    c and kap are sums of products, made by their recurrences: c_t = decay_t c_{t-1} + The_{0,t}
    and, from the end, kap_i = Gam_i + momentum_{i+1} kap_{i+1}.
    """
    sums, at = log_sums(decay), jnp.cumsum(momentum, axis=-1)
    carried = _recurrence(jnp.exp(decay), jnp.exp(at), reverse=False)
    after = jnp.pad(momentum[..., 1:], [(0, 0)] * (momentum.ndim - 1) + [(0, 1)])
    end = [jnp.broadcast_to(a[..., -1:], at.shape) for a in (at, carried)]
    left = _recurrence(jnp.exp(after), jnp.exp(sums["tail"]), reverse=True)
    made = (at, end[0] - at, end[0], carried, _shifted(carried), end[1], left)
    return dict(zip(gpu_momentum.VECTORS, made, strict=True))


def of_momentum_logs(of, decay, momentum):
    """Gradients of the logs of decay, to add, and of momentum, from those of `momentum_sums`."""
    found, pull = jax.vjp(momentum_sums, decay, momentum)
    of_decay, of_momentum = pull({n: of.get(n, jnp.zeros_like(a)) for n, a in found.items()})
    return of_decay, of_momentum + of["momentum_pairs"]


def _recurrence(factor, term, *, reverse):
    """y_t = factor_t y_{t-1} + term_t along the last axis."""

    def joined(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    axis = factor.ndim - 1
    return jax.lax.associative_scan(joined, (factor, term), reverse=reverse, axis=axis)[1]


def stacked(made, names=VECTORS):
    """A dict of vectors [S, N, 64] as [S, N, names, 64]; zeros for names that it lacks."""
    return jnp.stack([made.get(n, jnp.zeros_like(made["learning_rate"])) for n in names], axis=-2)


def of_logs(of, *, erase: bool, read: str | None):
    """The gradient of the logs of decay [S, N, 64].

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
