"""One token of a deep memory in O(1), for sampling: nothing here grows with the chunk.

The inner gradients of a chunk are those of its start, the anchor. So a token's context comes from
the anchor alone, and of all memories only the one that is read needs the weights of the moment.
They follow the recurrence as the paper prints it, token by token. The others are written once, by
the chunk's own write at its end.
"""

import jax
from jaxtyping import Array, Float

from pallas_kernels._linalg.products import nn, nt
from pallas_kernels.mlp_memory.anchor import Writes, predict, writes
from pallas_kernels.mlp_memory.context import generate
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
    return predict(_last(anchor), token.queries[:, None], rule).out[:, -1]


def running_start(anchor: FastWeights) -> FastWeights:
    """The weights of the moment at a chunk's start: those of the memory that is read."""
    return _last(anchor)


def read_running(
    anchor: FastWeights,
    running: FastWeights,
    token: Tokens,
    readout: Readout | None,
    rule: Rule,
    start: FastWeights | None = None,
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
      start: the weights that `rule.decay_to="start"` decays to.

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
    after = _written(_last(anchor), running, written, _alone(anchor, rule), start)
    assert queries is not None
    source = after if rule.read == "running" else running
    return after, predict(source, queries[:, None], rule).out[:, -1]


def _alone(anchor: FastWeights, rule: Rule) -> Rule:
    """The rule of the last memory as a group of its own."""
    last = anchor.outer.shape[1] - 1
    static, silent = ((0,) * (last in places) for places in (rule.static, rule.silent))
    return rule._replace(static=static, silent=silent)


def _written(anchor, running, token: Written, rule: Rule, start) -> FastWeights:
    """`running` after one more token."""
    if rule.static:
        return running
    of_inner, of_outer = writes(anchor, token, rule)
    start = _last(start) if rule.decay_to == "start" else None
    inner = (running.inner, running.inner_momentum)
    if of_inner is not None:
        inner = _write(*inner, of_inner, token, getattr(start, "inner", None))
    base = getattr(start, "outer", None)
    outer = _write(running.outer, running.outer_momentum, of_outer, token, base)
    return FastWeights(inner[0], outer[0], inner[1], outer[1])


def _write(weight, momentum, of: Writes, token: Written, start):
    """One matrix and its momentum after one more token."""
    step = -of.learning_rate[..., None] * nt(of.error, of.x)
    if momentum is not None:
        assert token.momentum is not None
        step = momentum = token.momentum[:, None, :, None] * momentum + step
    decay = token.decay[:, None, :, None]
    kept = decay * weight if start is None else start + decay * (weight - start)
    if of.erase is not None:
        kept = kept - nt(of.erase[..., None, :] * nn(weight, of.x), of.x)
    return kept + step, momentum


def _last(weights: FastWeights) -> FastWeights:
    return jax.tree.map(lambda a: a[:, -1:], weights)
