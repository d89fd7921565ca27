"""One chunk of the delta rule, forward and backward, by the warpgroup that holds 64 rows of it.

With `A` the overlaps of keys times their decays, strictly lower, and `T = (I + erase A)^-1`, the
erased and the written together are

    Z = T (erase g X W^T + eta E),   W' = g_C W - (tail Z)^T X,   O = g Q W^T - (decay Q X^T) Z.

Decays are exponentials of differences of log sums; see `VECTORS`. Values are loaded where they are
used and not before, since registers are the scarcest resource.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels._gpu.tiles import ROWS, Flipped, Warpgroup

# Numbers of a token, and log sums of decay: to it, to the one before, from it to the chunk's end,
# and of the whole chunk (64 times the same).
VECTORS = ("learning_rate", "erase", "at", "before", "tail", "total")
# What `pull` gives for them; "pairs" is of the logs of decay themselves.
GRADIENTS = (*VECTORS, "pairs")


class Chunk(NamedTuple):
    """One chunk's tokens, and the warpgroup that works on them.

    Attributes:
      on: the warpgroup.
      decay: whether the memory forgets.
      erase: whether it erases along the key.
      read: "running_prev", "running", or None for no reads.
      x: keys, a tile [64, n] in shared memory, as are the next three.
      error: gradients with respect to the memory's output, [64, 64].
      vectors: each of `VECTORS`, a reference or a value [64].
      queries: [64, n], or None.
      of_reads: the cotangent of the reads [64, 64], or None.
      theta: of `gpu_momentum`, a tile.
      written: of `gpu_momentum`, a tile.
    """

    on: Warpgroup
    decay: bool
    erase: bool
    read: str | None
    x: Any
    error: Any
    vectors: dict[str, Any]
    queries: Any = None
    of_reads: Any = None
    theta: Any = None
    written: Any = None

    def rows(self, name, columns=ROWS):
        """A vector along the rows of a matrix [64, columns]."""
        return self.on.along_rows(self.vectors[name], columns)

    def vector(self, name):
        """A vector as it comes from sums along rows, [64]."""
        return self.on.vector(self.vectors[name])

    def factor(self, name, columns=ROWS):
        """exp of a vector of log sums along the rows."""
        return jnp.exp(self.rows(name, columns))

    def table(self, matrix, *, read=None):
        """A matrix [t, i] times the decay from i to the token before t (to t for "running")."""
        inclusive = read == "running"
        if inclusive:
            inside = lambda t, i: i <= t  # noqa: E731
        else:
            inside = lambda t, i: i < t  # noqa: E731
        if not self.decay:
            return self.on.masked(matrix, inside)
        until = self.rows("at" if inclusive else "before")
        since = self.on.along_columns(self.vectors["at"])
        # masked before exp, so that nothing overflows
        return matrix * jnp.exp(self.on.masked(until - since, inside, other=-jnp.inf))


class Carried(NamedTuple):
    """What a backward step works on besides its tokens: references to shared memory.

    Attributes:
      state: the memory at the chunk's start, a tile [64, n].
      back: a tile [64, n] for the cotangent of the memory after the chunk.
      work: four tiles [64, 64].
    """

    state: Any
    back: Any
    work: Any


def overlaps(chunk: Chunk):
    """A: the overlaps of the keys times what is left of the earlier one at the later."""
    return chunk.table(chunk.on.product((chunk.x, Flipped(chunk.x))))


def solve(chunk: Chunk, state, work, *, inverse=None):
    """Find Z.

    Args:
      chunk: tokens.
      state: the memory at its start, a tile.
      work: two tiles that hold nothing of use afterwards.
      inverse: a tile that takes T for the backward pass; may be the first of `work`.
    """
    on = chunk.on
    if not chunk.erase:
        return chunk.rows("learning_rate") * on.get(chunk.error)
    found = on.inverse(chunk.rows("erase") * overlaps(chunk), work[0], work[1])
    if inverse is not None:
        on.put(inverse, found)
    seen = on.product((chunk.x, Flipped(state)))
    scale = chunk.rows("erase")
    if chunk.decay:
        scale = scale * chunk.factor("before")
    on.put(work[1], scale * seen + chunk.rows("learning_rate") * on.get(chunk.error))
    return on.product((on.split(found), work[1]))


def advance(chunk: Chunk, weight, total, work):
    """The memory after the chunk; `work` is a tile."""
    on, columns = chunk.on, weight.shape[1]
    if chunk.decay:
        weight = chunk.factor("total", columns) * weight
        total = chunk.factor("tail") * total
    on.put(work, -total)
    return weight + on.product((Flipped(work), chunk.x))


def read(chunk: Chunk, state, total, work):
    """What the queries of a chunk read; `work` is a tile."""
    on = chunk.on
    found = on.product((chunk.queries, Flipped(state)))
    if chunk.decay:
        found = chunk.factor(until(chunk)) * found
    scores = chunk.table(on.product((chunk.queries, Flipped(chunk.x))), read=chunk.read)
    on.put(work, total)
    return found - on.product((on.split(scores), work))


def until(chunk):
    """Up to which token a read is decayed."""
    return "at" if chunk.read == "running" else "before"


def pull(chunk: Chunk, held: Carried, back, give: Callable):
    """One chunk backward: gives its tokens' gradients and returns that of the memory before it.

    `held.back` is free to be overwritten once "x" is given.

    Args:
      chunk: tokens.
      held: see `Carried`.
      back: the cotangent of the memory after the chunk, [64, n].
      give: a function of a name and a value; vectors that are given twice are added. Matrices come
        in the order "queries", "error", "x".
    """
    on, work, columns = chunk.on, held.work, back.shape[1]
    on.put(held.back, back)
    total = solve(chunk, held.state, work, inverse=work[0])
    on.put(work[1], total)
    of_total = -on.product((chunk.x, Flipped(held.back)))
    if chunk.decay:
        of_total = chunk.factor("tail") * of_total
        give("tail", jnp.sum(of_total * on.get(work[1]), axis=1))
    if chunk.read:
        of_total = of_total + _pull_read(chunk, held, give)
    of_written = _pull_solve(chunk, held, of_total, give) if chunk.erase else of_total
    give("learning_rate", jnp.sum(of_written * on.get(chunk.error), axis=1))
    give("error", chunk.rows("learning_rate") * of_written)
    total = -on.get(work[1])
    if chunk.decay:
        total = chunk.factor("tail") * total
    terms = [(on.split(total), held.back)]
    if chunk.read:
        terms.append((Flipped(work[2]), chunk.queries))
    if chunk.erase:
        terms += [(work[0], chunk.x), (Flipped(work[0]), chunk.x), (work[3], held.state)]
    give("x", on.product(*terms))
    if chunk.decay:
        back = chunk.factor("total", columns) * back
        give("total", jnp.sum(back * on.get(held.state), axis=1))
    terms = [(Flipped(work[3]), chunk.x)] if chunk.erase else []
    if chunk.read:
        of_reads = on.get(chunk.of_reads)
        if chunk.decay:
            of_reads = chunk.factor(until(chunk)) * of_reads
        on.put(work[2], of_reads)
        terms.append((Flipped(work[2]), chunk.queries))
    return back + on.product(*terms) if terms else back


def _pull_read(chunk: Chunk, held: Carried, give):
    """The cotangent of Z through the reads (to add).

    Leaves that of the scores in `work[2]` and takes Z from `work[1]`.
    """
    on, work = chunk.on, held.work
    scores = on.product((chunk.queries, Flipped(chunk.x)))
    on.put(work[2], chunk.table(scores, read=chunk.read))
    of_total = -on.product((Flipped(work[2]), chunk.of_reads))
    of_scores = -on.product((chunk.of_reads, Flipped(work[1])))
    of_scores = chunk.table(of_scores, read=chunk.read)
    on.put(work[2], of_scores)
    if chunk.decay:
        give("pairs", pull_pairs(on, of_scores * scores, work[3], read=chunk.read))
    of_queries = on.product((chunk.of_reads, held.state))
    if chunk.decay:
        when, columns = until(chunk), held.state.shape[-1]
        of_queries = chunk.factor(when, columns) * of_queries
        give(when, jnp.sum(on.get(chunk.queries) * of_queries, axis=1))
    give("queries", of_queries + on.product((work[2], chunk.x)))
    return of_total


def _pull_solve(chunk: Chunk, held: Carried, of_total, give):
    """The cotangent of what is written, through the solve.

    Leaves that of the overlaps in `work[0]` and that of X W^T in `work[3]`; takes T from `work[0]`
    and Z from `work[1]`.
    """
    on, work = chunk.on, held.work
    on.put(work[3], of_total)
    of_written = on.product((Flipped(work[0]), work[3]))
    seen = on.product((chunk.x, Flipped(held.state)))  # again: cheaper than a tile to hold it
    if chunk.decay:
        seen = chunk.factor("before") * seen
    of_scale = jnp.sum(of_written * seen, axis=1)
    give("erase", of_scale)
    of_seen = chunk.rows("erase") * of_written
    if chunk.decay:
        give("before", chunk.vector("erase") * of_scale)
        of_seen = chunk.factor("before") * of_seen
    on.put(work[3], of_seen)
    of_lower = on.product((on.split(of_written), Flipped(work[1])))
    of_lower = -on.masked(of_lower, lambda t, i: i < t)
    of_lower_overlaps = of_lower * overlaps(chunk)
    give("erase", jnp.sum(of_lower_overlaps, axis=1))
    if chunk.decay:
        pairs = chunk.rows("erase") * of_lower_overlaps
        give("pairs", pull_pairs(on, pairs, work[0], read=None))
    on.put(work[0], chunk.table(chunk.rows("erase") * of_lower))
    return of_written


def pull_pairs(on: Warpgroup, pairs, work, *, read):
    """Of the logs of decay: the sums over pairs (i, t) with i < j < t (j <= t for "running").

    As one product, not as differences of running sums: those would cancel, and the gradient by a
    decay of 1e-4 divides by it, which would magnify what they lose.
    """
    on.put(work, pairs)
    earlier = on.masked(on.full(1.0, ROWS), lambda j, i: i < j)
    sums = on.product(((earlier.astype(jnp.bfloat16),), Flipped(work)))
    inside = (lambda j, t: j <= t) if read == "running" else (lambda j, t: j < t)
    return jnp.sum(on.masked(sums, inside), axis=1)
