"""One chunk of residual two-layer memories M(z) = z + U s(V z), or linear ones, that share keys.

A group holds n memories per head that see the same keys, values and gates, so that their first
layers are one tall matrix, whose Gram matrix and triangular inverse are computed once for all of
them. Tokens are columns ([features, C]): then every product below takes its matrices as they lie in
memory, and splitting the tall matrix into the memories moves nothing. Heads are the first axis.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import delta_rule
from pallas_kernels._linalg.numerics import PLAIN, Form
from pallas_kernels._linalg.products import nn
from pallas_kernels.delta_rule import Operands, Solved, Tables
from pallas_kernels.mlp_memory.anchor import Writes, activation, writes
from pallas_kernels.mlp_memory.types import FastWeights, Reads, Rule, Written


def write_chunk(
    weights: FastWeights,
    chunk: Written,
    rule: Rule,
    reads: Reads | None = None,
    *,
    start: FastWeights | None = None,
    form: Form = PLAIN,
) -> tuple[FastWeights, Float[Array, "H d C"] | None]:
    """Write one chunk into every memory of the group, and read the last one on the way.

    The inner gradient of `1/2 ||M(k) - vhat||^2` (or `-<M(k), vhat>`) is taken at the weights of
    the chunk's start with `vhat = M(v)` constant in it (spec C6.5); the outer loss differentiates
    through everything. Both matrices then follow the delta rule with their own layer input.

    Args:
      weights: at the chunk's start, the anchor.
      chunk: what is written.
      rule: how.
      reads: `predict` of the group, whose last inputs are the queries; None reads nothing.
      start: the weights that `rule.decay_to="start"` decays to.
      form: see `Form`.

    Returns:
      The fast weights after the chunk and the reads, [H, d, C] (None without queries).
    """
    if rule.static:
        return _write_others(weights, chunk, rule, reads, start, form)
    of_inner, of_outer = writes(weights, chunk, rule, form)
    from_start = start if rule.decay_to == "start" else None
    tables = delta_rule.chunk_tables(chunk.learning_rate, chunk.decay, chunk.momentum, form)
    # The inverse of V is not named for the checkpoint policy: it is one small matrix for all
    # memories, cheaper to compute again than to store. U has one for each memory.
    given = []
    for name, of in (("inner", of_inner), ("outer", of_outer)):
        if of is not None:
            given.append(_operands(name, weights, of, tables, from_start, form))
    *inner, outer = delta_rule.solve_chunks(given, form)
    read = None
    if reads is not None:
        read = _read_last(inner[0] if inner else None, outer, reads, rule, from_start)
    ends: dict[str, tuple[Any, Any]] = {"inner": (weights.inner, weights.inner_momentum)}
    for name, solved in zip(["inner"] * len(inner) + ["outer"], [*inner, outer], strict=True):
        end, momentum = delta_rule.write_chunk(solved)
        old, base = getattr(weights, name), getattr(from_start, name, None)
        end = end.reshape(old.shape)
        ends[name] = (end if base is None else end + base, _shaped(momentum, old.shape))
    (inner_end, inner_momentum), (outer_end, outer_momentum) = ends["inner"], ends["outer"]
    return FastWeights(inner_end, outer_end, inner_momentum, outer_momentum), read


def _operands(
    name: str, weights: FastWeights, of: Writes, tables: Tables, start, form: Form
) -> tuple[Operands, Tables, bool]:
    """One matrix of all memories as a system of the delta rule; tall where they share its input.

    What decays to the start is D = W - W_0, which follows the same recurrence with the erasure of
    W_0 as one more write.
    """
    initial, momentum = getattr(weights, name), getattr(weights, f"{name}_momentum")
    x, error, eta, erase, anchored = of
    if start is not None:
        base = getattr(start, name)
        held = nn(base, jnp.broadcast_to(x, (*base.shape[:2], *x.shape[2:])), form)
        error, eta = eta[..., None, :] * error, jnp.ones_like(eta)
        if erase is not None:
            error = error + erase[..., None, :] * held
        initial, anchored = initial - base, anchored - held
    if name == "inner" or weights.inner is None:
        heads, n, rows, columns = initial.shape

        def flat(array):
            return None if array is None else array.reshape(heads, n * rows, array.shape[-1])

        one = Operands(
            x=x[:, 0],
            error=flat(error),
            learning_rate=eta[:, 0],
            erase=None if erase is None else erase[:, 0],
            initial=flat(initial),
            initial_momentum=flat(momentum),
            anchored=flat(anchored),
        )
        return one, tables, False
    of_each = Operands(
        x=x,
        error=error,
        learning_rate=eta,
        erase=erase,
        initial=initial,
        initial_momentum=momentum,
        anchored=anchored,
    )
    return of_each, jax.tree.map(lambda table: table[:, None], tables), not form.dense


def _read_last(inner: Solved | None, outer: Solved, reads: Reads, rule: Rule, start):
    """Read the last memory of a group whose chunk is solved, V by the queries, then U by s(V q)."""
    if rule.read == "anchor":
        return reads.out[:, -1]
    queries = reads.inputs[:, -1]
    if reads.before is None:
        read = _read_rows(outer, queries, rule, None, _last(start, "outer"))
        return queries + read if rule.residual else read
    seen = reads.before[:, -1]
    if inner is not None:
        seen = _read_rows(inner, queries, rule, seen, _last(start, "inner"), rows=seen.shape[-2])
    h = activation(seen)
    one = _memory(outer)
    base = _last(start, "outer")
    read = delta_rule.read_chunk(one, h, read=rule.read)
    if base is not None:
        read = read + nn(base, h, outer.form)
    return queries + read


_ROWS = ("initial", "initial_momentum", "written", "erased")


def _read_rows(tall: Solved, queries, rule: Rule, anchored, base, rows: int | None = None):
    """Read the last memory's rows of a tall matrix."""
    rows = queries.shape[-2] if rows is None else rows
    last = {name: getattr(tall, name) for name in _ROWS}
    last = {name: None if a is None else a[:, -rows:] for name, a in last.items()}
    if base is None:
        return delta_rule.read_chunk(
            tall._replace(**last), queries, read=rule.read, anchored=anchored
        )
    read = delta_rule.read_chunk(tall._replace(**last), queries, read=rule.read)
    return read + nn(base, queries, tall.form)


def _memory(outer: Solved) -> Solved:
    """The last memory of those that have a system each."""
    last = {name: getattr(outer, name) for name in (*_ROWS, "x")}
    last = {name: None if a is None else a[:, -1] for name, a in last.items()}
    tables = jax.tree.map(lambda table: table[:, 0], outer.tables)
    return outer._replace(tables=tables, **last)


def _last(start: FastWeights | None, name: str):
    return None if start is None else getattr(start, name)[:, -1]


def _write_others(weights, chunk, rule: Rule, reads, start, form: Form):
    """Write the memories that are not static; a static one that is read is read as it is."""
    n = weights.outer.shape[1]
    moving = [i for i in range(n) if i not in rule.static]
    last = n - 1 in moving
    read = None if reads is None or last else reads.out[:, -1]
    if not moving:
        return weights, read

    def some(tree):
        return jax.tree.map(lambda a: jnp.stack([a[:, i] for i in moving], axis=1), tree)

    silent = tuple(moving.index(i) for i in rule.silent if i in moving)
    others = rule._replace(static=(), silent=silent)
    new, found = write_chunk(
        some(weights),
        chunk,
        others,
        some(reads) if last and reads is not None else None,
        start=None if start is None else some(start),
        form=form,
    )

    def put(old, new):
        places = {i: new[:, j] for j, i in enumerate(moving)}
        return jnp.stack([places.get(i, old[:, i]) for i in range(n)], axis=1)

    return jax.tree.map(put, weights, new), found if last else read


def _shaped(array, shape):
    return None if array is None else array.reshape(shape)
