"""One chunk of the delta rule with momentum, forward and backward; see `gpu_chunk` without it.

    S_t = mom_t S_{t-1} - eta_t e_t x_t^T,   W_t = W_{t-1} (decay_t I - erase_t x_t x_t^T) + S_t

Gam and The are the products of decay and of momentum between two tokens, kap = Gam The is what is
left of a write, and c how much of the momentum at the start has reached the memory. The chunk
writes P = eta E and erases Y:

    Y = T erase (g X W^T + c X S^T - (kap X X^T) P),
    O = g Q W^T + c Q S^T - (kap Q X^T) P - (Gam Q X^T) Y,
    W' = g_C W + c_C S - (kap_C P + tail Y)^T X,   S' = the_C S - (the P)^T X.

The functions are those of `gpu_chunk`; states, weights and cotangents are pairs of W and S.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels._gpu.tiles import ROWS, Flipped
from pallas_kernels.delta_rule.gpu_chunk import Carried, Chunk, pull_pairs, until

# Numbers of a token, besides those of `gpu_chunk`: log sums of momentum to it, from it to the
# chunk's end and of the whole chunk; c to it, to the one before and to the end; kap to the end.
VECTORS = (
    *("momentum_at", "momentum_tail", "momentum_total"),
    *("carried_at", "carried_before", "carried_end", "write_end"),
)
# What `pull` gives for them; the pairs are of the logs of momentum themselves.
GRADIENTS = (*VECTORS[1:], "momentum_pairs")
WORK = 7  # tiles of `Carried`


def fill_theta(chunk: Chunk) -> None:
    """Fill the tile The, [later, earlier]."""
    on = chunk.on
    later, earlier = (
        chunk.rows("momentum_at"),
        on.along_columns(chunk.vectors["momentum_at"]),
    )
    logs = on.masked(later - earlier, lambda t, i: i <= t, other=-jnp.inf)
    on.put(chunk.theta, jnp.exp(logs))


def _decays(chunk: Chunk, read):
    """Gam to each token (to the one before it, unless `read` is "running")."""
    return chunk.table(chunk.on.full(1.0, ROWS), read=read)


def _left(chunk: Chunk, read):
    """kap to each token, or to the one before it."""
    on = chunk.on
    return on.product((on.split(_decays(chunk, read)), chunk.theta))


def _overlaps(chunk: Chunk):
    return chunk.on.product((chunk.x, Flipped(chunk.x)))


def _carried(chunk: Chunk):
    """The name of c at which the queries read."""
    return "carried_at" if chunk.read == "running" else "carried_before"


def solve(chunk: Chunk, state, work, *, inverse=None):
    """Find Y, or None where nothing is erased; fills The and P in the tiles of the chunk."""
    on = chunk.on
    fill_theta(chunk)
    on.put(chunk.written, chunk.rows("learning_rate") * on.get(chunk.error))
    if not chunk.erase:
        return None
    lower = chunk.rows("erase") * chunk.table(_overlaps(chunk))
    found = on.inverse(lower, work[0], work[1])
    if inverse is not None:
        on.put(inverse, found)
    on.put(work[1], chunk.rows("erase") * _seen(chunk, state))
    return on.product((on.split(found), work[1]))


def _seen(chunk: Chunk, state):
    """What every key would read if nothing were erased in the chunk."""
    on = chunk.on
    seen = _started(chunk, chunk.x, state, "before", "carried_before")
    left = _left(chunk, None) * _overlaps(chunk)
    return seen - on.product((on.split(left), chunk.written))


def _started(chunk: Chunk, rows, state, when, carried):
    """What W and S at the chunk's start contribute."""
    on = chunk.on
    found = chunk.factor(when) * on.product((rows, Flipped(state[0])))
    return found + chunk.rows(carried) * on.product((rows, Flipped(state[1])))


def read(chunk: Chunk, state, total, work):
    """What the queries of a chunk read; `work` is a tile."""
    on = chunk.on
    found = _started(chunk, chunk.queries, state, until(chunk), _carried(chunk))
    scores = on.product((chunk.queries, Flipped(chunk.x)))
    left = _left(chunk, chunk.read) * scores
    found = found - on.product((on.split(left), chunk.written))
    if total is None:
        return found
    on.put(work, total)
    return found - on.product((on.split(chunk.table(scores, read=chunk.read)), work))


def advance(chunk: Chunk, weights, total, work):
    """The memory and the momentum after the chunk; `work` is a tile."""
    on, (weight, velocity) = chunk.on, weights
    on.put(work, -_leaves(chunk, total))
    columns = weight.shape[1]
    after = chunk.factor("total", columns) * weight + chunk.rows("carried_end", columns) * velocity
    after = after + on.product((Flipped(work), chunk.x))
    on.put(work, -chunk.factor("momentum_tail") * on.get(chunk.written))
    velocity = chunk.factor("momentum_total", columns) * velocity
    return after, velocity + on.product((Flipped(work), chunk.x))


def _leaves(chunk: Chunk, total):
    """What each token leaves in the memory at the chunk's end."""
    left = chunk.rows("write_end") * chunk.on.get(chunk.written)
    return left if total is None else left + chunk.factor("tail") * total


def pull(chunk: Chunk, held: Carried, backs, give):
    """One chunk backward; see `gpu_chunk.pull`. `held.work` is `WORK` tiles."""
    on, work, (back, of_velocity) = chunk.on, held.work, backs
    for tile, value in zip(held.back, backs, strict=True):
        on.put(tile, value)
    total = solve(chunk, held.state, work, inverse=work[0])
    if total is not None:
        on.put(work[1], total)
    of_leaves = -on.product((chunk.x, Flipped(held.back[0])))
    written = on.get(chunk.written)
    give("write_end", jnp.sum(of_leaves * written, axis=1))
    of_written = chunk.rows("write_end") * of_leaves
    of_total: Any = None
    if chunk.erase:
        of_total = chunk.factor("tail") * of_leaves
        give("tail", jnp.sum(of_total * on.get(work[1]), axis=1))
    of_left = -chunk.factor("momentum_tail") * on.product((chunk.x, Flipped(held.back[1])))
    give("momentum_tail", jnp.sum(of_left * on.get(chunk.written), axis=1))
    of_written = of_written + of_left
    if chunk.read:
        more, of_erased = _pull_read(chunk, held, give)
        of_written = of_written + more
        of_total = of_total + of_erased if chunk.erase else None
    if chunk.erase:
        of_written = of_written + _pull_solve(chunk, held, of_total, give)
    give("learning_rate", jnp.sum(of_written * on.get(chunk.error), axis=1))
    give("error", chunk.rows("learning_rate") * of_written)
    _pull_keys(chunk, held, give)
    return _pull_states(chunk, held, back, of_velocity, give)


def _pull_keys(chunk: Chunk, held: Carried, give):
    on, work = chunk.on, held.work
    leaves = _leaves(chunk, on.get(work[1]) if chunk.erase else None)
    left = chunk.factor("momentum_tail") * on.get(chunk.written)
    terms = [(on.split(-leaves), held.back[0]), (on.split(-left), held.back[1])]
    if chunk.read:
        terms.append((Flipped(work[2]), chunk.queries))
    if chunk.erase:
        terms += [(work[0], chunk.x), (Flipped(work[0]), chunk.x)]
        terms += [(work[3], held.state[0]), (work[4], held.state[1])]
    give("x", on.product(*terms))


def _pull_states(chunk: Chunk, held: Carried, back, of_velocity, give):
    """The cotangents of W and S at the chunk's start."""
    on, work, columns = chunk.on, held.work, back.shape[1]
    give("carried_end", jnp.sum(back * on.get(held.state[1]), axis=1))
    reached = chunk.rows("carried_end", columns) * back
    back = chunk.factor("total", columns) * back
    give("total", jnp.sum(back * on.get(held.state[0]), axis=1))
    of_velocity = chunk.factor("momentum_total", columns) * of_velocity
    give("momentum_total", jnp.sum(of_velocity * on.get(held.state[1]), axis=1))
    of_velocity = of_velocity + reached
    if chunk.erase:
        back = back + on.product((Flipped(work[3]), chunk.x))
        of_velocity = of_velocity + on.product((Flipped(work[4]), chunk.x))
    if chunk.read:
        of_reads = on.get(chunk.of_reads)
        on.put(work[2], chunk.factor(until(chunk)) * of_reads)
        back = back + on.product((Flipped(work[2]), chunk.queries))
        on.put(work[2], chunk.rows(_carried(chunk)) * of_reads)
        of_velocity = of_velocity + on.product((Flipped(work[2]), chunk.queries))
    return back, of_velocity


def _pull_read(chunk: Chunk, held: Carried, give):
    """The cotangents of P and Y through the reads; leaves that of the scores in `work[2]`."""
    on, work = chunk.on, held.work
    scores = on.product((chunk.queries, Flipped(chunk.x)))
    left = _left(chunk, chunk.read)
    on.put(work[2], left * scores)
    of_written = -on.product((Flipped(work[2]), chunk.of_reads))
    of_both = -on.product((chunk.of_reads, Flipped(chunk.written)))
    of_scores = left * of_both
    _pull_left(chunk, of_both * scores, (work[5], work[6]), give, read=chunk.read)
    of_total: Any = None
    if chunk.erase:
        on.put(work[2], chunk.table(scores, read=chunk.read))
        of_total = -on.product((Flipped(work[2]), chunk.of_reads))
        of_both = -on.product((chunk.of_reads, Flipped(work[1])))
        of_both = chunk.table(of_both, read=chunk.read)
        give("pairs", pull_pairs(on, of_both * scores, work[5], read=chunk.read))
        of_scores = of_scores + of_both
    on.put(work[2], of_scores)
    of_queries = chunk.factor(until(chunk)) * on.product((chunk.of_reads, held.state[0]))
    give(until(chunk), jnp.sum(on.get(chunk.queries) * of_queries, axis=1))
    more = on.product((chunk.of_reads, held.state[1]))
    give(_carried(chunk), jnp.sum(on.get(chunk.queries) * more, axis=1))
    of_queries = of_queries + chunk.rows(_carried(chunk)) * more
    give("queries", of_queries + on.product((work[2], chunk.x)))
    return of_written, of_total


def _pull_solve(chunk: Chunk, held: Carried, of_total, give):
    """The cotangent of P through what is erased.

    Leaves that of the overlaps in `work[0]`, of X W^T in `work[3]` and of X S^T in `work[4]`; takes
    T from `work[0]` and Y from `work[1]`.
    """
    on, work = chunk.on, held.work
    on.put(work[3], of_total)
    of_right = on.product((Flipped(work[0]), work[3]))
    give("erase", jnp.sum(of_right * _seen(chunk, held.state), axis=1))
    of_lower = on.product((on.split(of_right), Flipped(work[1])))
    of_lower = -on.masked(of_lower, lambda t, i: i < t)
    kept = chunk.table(of_lower) * _overlaps(chunk)
    give("erase", jnp.sum(kept, axis=1))
    give("pairs", pull_pairs(on, chunk.rows("erase") * kept, work[5], read=None))
    on.put(work[0], chunk.table(chunk.rows("erase") * of_lower))
    of_right = chunk.rows("erase") * of_right
    on.put(work[3], of_right)  # as it is, for two products
    overlaps, left = _overlaps(chunk), _left(chunk, None)
    on.put(work[4], left * overlaps)
    of_written = -on.product((Flipped(work[4]), work[3]))
    of_both = -on.product((work[3], Flipped(chunk.written)))
    on.put(work[0], on.get(work[0]) + left * of_both)
    _pull_left(chunk, of_both * overlaps, (work[5], work[6]), give, read=None)
    of_right = on.get(work[3])
    on.put(work[4], chunk.rows("carried_before") * of_right)
    more = on.product((chunk.x, Flipped(held.state[1])))
    give("carried_before", jnp.sum(of_right * more, axis=1))
    of_right = chunk.factor("before") * of_right
    on.put(work[3], of_right)
    more = on.product((chunk.x, Flipped(held.state[0])))
    give("before", jnp.sum(of_right * more, axis=1))
    return of_written


def _pull_left(chunk: Chunk, of_left, work, give, *, read):
    """Through kap = Gam The, to the logs of decay and of momentum; `work` is two tiles."""
    on = chunk.on
    on.put(work[0], of_left)
    decays = _decays(chunk, read)
    of_decays = on.product((work[0], Flipped(chunk.theta)))
    on.put(work[1], decays)
    of_theta = on.product((Flipped(work[1]), work[0]))
    give("pairs", pull_pairs(on, of_decays * decays, work[1], read=read))
    of_theta = on.masked(of_theta * on.get(chunk.theta), lambda t, i: i <= t)
    give("momentum_pairs", pull_pairs(on, of_theta, work[1], read="running"))
