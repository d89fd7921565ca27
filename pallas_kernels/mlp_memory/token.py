"""One token of a deep memory in O(1), for sampling: nothing here grows with the chunk.

The inner gradients of a chunk are those of its start, the anchor. So a token's context comes from
the anchor alone, and of all memories only the one that is read needs the weights of the moment.
They follow the recurrence as the paper prints it, token by token. The others are written once, by
the chunk's own write at its end.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._linalg.numerics import PLAIN
from pallas_kernels._linalg.products import nn, nt, tn
from pallas_kernels.mlp_memory.chunk import (
    _at_anchor,
    _clipped,
    _erase,
    generate,
    predict,
)
from pallas_kernels.mlp_memory.types import FastWeights, Readout, Rule, Tokens, Written


def read_anchor(
    anchor: FastWeights, token: Tokens, readout: Readout | None, rule: Rule
) -> Float[Array, "H d 1"]:
    """What the group's last memory says to a token's queries at the chunk's start.

    Args:
      anchor: the fast weights of all memories at the chunk's start.
      token: one column of each.
      readout: how the memories make their context; None where `token` is the context.
      rule: see `Rule`.
    """
    if readout is not None:
        return generate(anchor, token, readout, rule, queried=True)[2].out[:, -1]
    assert token.queries is not None
    return predict(_last(anchor), token.queries[:, None]).out[:, -1]


def running_start(anchor: FastWeights) -> FastWeights:
    """The weights of the moment at a chunk's start: those of the memory that is read."""
    return _last(anchor)


def read_running(
    anchor: FastWeights, running: FastWeights, token: Tokens, readout: Readout | None, rule: Rule
) -> tuple[FastWeights, Float[Array, "H d 1"]]:
    """Write one token into the weights of the moment and read them.

    V_t = V_{t-1} (decay I - erase k k^T) + S_t with S_t = momentum S_{t-1} - learning_rate g, g the
    gradient at the anchor; the same for U with its own input. `rule.read` says whether the read is
    of t - 1 ("running_prev") or t ("running").

    Args:
      anchor: the fast weights of all memories at the chunk's start.
      running: those of the last one after the chunk's earlier tokens, a group of one.
      token: one column of each.
      readout: how the memories make their context; None where `token` is the context.
      rule: see `Rule`.

    Returns:
      The weights after the token, and the read.

    Reference: Nested Learning (arXiv 2512.24695), eq. 89-93; spec C6.5.
    """
    queries, written = token.queries, None
    if readout is not None:
        queries, written, _ = generate(anchor, token, readout, rule, queried=False)
    else:
        assert token.learning_rate is not None and token.decay is not None
        context = token.keys, token.values, token.learning_rate, token.decay
        written = Written(*context, token.momentum)
    after = _written(_last(anchor), running, written, rule)
    assert queries is not None
    source = after if rule.read == "running" else running
    return after, predict(source, queries[:, None]).out[:, -1]


def _written(anchor, running, token: Written, rule: Rule) -> FastWeights:
    """`running` after one more token."""
    found = _at_anchor(anchor, token, rule, PLAIN)
    keys = token.keys[:, None]
    size, wide = jnp.sum(keys**2, axis=-2), jnp.sum(found.h**2, axis=-2)
    inner_error = _clipped(tn(anchor.outer, found.error) * found.slope, size, rule)
    outer_error = _clipped(found.error, wide, rule)
    learning_rate = token.learning_rate[:, None]

    def write(layer, weight, momentum, x, error, squared_norm):
        step = -learning_rate[..., None] * nt(error, x)
        if momentum is not None:
            assert token.momentum is not None
            step = momentum = token.momentum[:, None, :, None] * momentum + step
        erase = _erase(rule, layer, learning_rate, squared_norm)
        new = token.decay[:, None, :, None] * weight + step
        if erase is not None:
            new = new - nt(erase[..., None] * nn(weight, x), x)
        return new, momentum

    inner, inner_momentum = write(
        "inner", running.inner, running.inner_momentum, keys, inner_error, size
    )
    outer, outer_momentum = write(
        "outer", running.outer, running.outer_momentum, found.h, outer_error, wide
    )
    return FastWeights(inner, outer, inner_momentum, outer_momentum)


def _last(weights: FastWeights) -> FastWeights:
    return jax.tree.map(lambda a: a[:, -1:], weights)
