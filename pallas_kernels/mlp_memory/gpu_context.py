"""A chunk's context from the memories of a self-modifying group, and its pull; on one warpgroup.

At the chunk's start each of the memories key, learning rate, decay and value says M(z) of its
input: the keys and values that all memories learn, and the logits of their learning rates and
decays (see `mlp_memory.chunk.generate`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels._gpu.tiles import ROWS, Warpgroup
from pallas_kernels.delta_rule.gpu_chunk import pull_pairs
from pallas_kernels.mlp_memory.gpu_cell import erase_of, erases_of, predict, pull_erase
from pallas_kernels.mlp_memory.types import Rule

KEY, LEARNING_RATE, DECAY, VALUE, READ = range(5)  # the memories of a group
# Of a readout, [4, 64]: the weights, and the biases 64 times.
READOUT = ("learning_rate", "decay", "learning_rate_bias", "decay_bias")
_SMALL = 1e-6  # added to a squared norm, as in `chunk.unit`
_LEAST = jnp.finfo(jnp.float32).tiny.item()  # log 0 would give inf - inf in the sums


class Context(NamedTuple):
    """Where a chunk's context is made, on the block that holds the group.

    Attributes:
      on: the warpgroup.
      rule: see `Rule`.
      keys: a tile of the inputs of key, learning rate and decay.
      values: a tile of the inputs of value.
      matrices: tiles for V and U of one memory.
      readout: each of `READOUT`, a reference [64] in global memory.
      held: a reference to 64 floats of shared memory.
      begin: `begin(i)` fills `matrices` with those of a memory at the chunk's start.
    """

    on: Warpgroup
    rule: Rule
    keys: Any
    values: Any
    matrices: tuple[Any, Any]
    readout: dict[str, Any]
    held: Any
    begin: Callable

    def say(self, memory: int):
        """M(z) of a memory, [64, 64]."""
        self.begin(memory)
        return predict(self.on, self.values if memory == VALUE else self.keys, self.matrices)

    def gate(self, name: str, said):
        """sigmoid(w . M(x) + b) of each token, [64]."""
        weights = self.on.along_columns(self.readout[name])
        bias = self.on.vector(self.readout[f"{name}_bias"])
        return lax.logistic(jnp.sum(said * weights, axis=1) + bias)


def generate(context: Context, keys, values, vectors: dict[str, Any]) -> None:
    """Fill the tiles of keys and values, which may be those of their inputs, and the vectors.

    Of those of `gpu_momentum` the log sums are there already.
    """
    on, rule = context.on, context.rule
    eta = rule.max_learning_rate * context.gate("learning_rate", context.say(LEARNING_RATE))
    decay = context.gate("decay", context.say(DECAY))
    on.put(values, context.say(VALUE))
    said = context.say(KEY)
    said = on.along_rows(_shrink(said), ROWS) * said
    size = jnp.sum(said * said, axis=1)
    on.put(keys, said)
    logs, zero = jnp.log(jnp.maximum(decay, _LEAST)), 0.0 * eta
    made = {"learning_rate": eta, "size": size}
    made["erase"] = erase_of(eta, size, rule) if erases_of(rule)[0] else zero
    made["at"] = on.sums(logs, context.held, lambda t, j: j <= t)
    made["before"] = on.sums(logs, context.held, lambda t, j: j < t)
    made["tail"] = on.sums(logs, context.held, lambda t, j: j > t)
    made["total"] = on.sums(logs, context.held, lambda t, j: j >= 0)
    for name, value in made.items():
        vectors[name][...] = value
    if "momentum_at" in vectors:
        for name in ("carried_at", "carried_before"):
            vectors[name][...] = jnp.sum(_carried_terms(on, vectors, name), axis=1)
        terms = on.along_columns(vectors["tail"]) + on.along_columns(vectors["momentum_at"])
        vectors["carried_end"][...] = jnp.sum(jnp.exp(terms), axis=1)
        terms = terms - on.along_rows(vectors["momentum_at"], ROWS)
        terms = on.masked(terms, lambda i, j: j >= i, other=-jnp.inf)
        vectors["write_end"][...] = jnp.sum(jnp.exp(terms), axis=1)


def _carried_terms(on: Warpgroup, vectors, name):
    """The terms [t, j] of c to t, or to the token before: The_{0,j} Gam_{j,t}."""
    inside = (lambda t, j: j <= t) if name == "carried_at" else (lambda t, j: j < t)
    until = on.along_rows(vectors["at" if name == "carried_at" else "before"], ROWS)
    logs = until - on.along_columns(vectors["at"]) + on.along_columns(vectors["momentum_at"])
    return jnp.exp(on.masked(logs, inside, other=-jnp.inf))


def _pull_momentum(context: Context, of, vectors, work):
    """Through the sums of `generate`: of the logs of decay, to add, of "tail", and of momentum."""
    on, held = context.on, context.held
    total = of["momentum_pairs"] + on.sums(of["momentum_tail"], held, lambda i, j: j < i)
    total = total + on.sums(of["momentum_total"], held, lambda i, j: j >= 0)
    of_decay: Any = None
    of_at = on.sums(of["carried_end"], held, lambda i, j: j >= 0)
    of_at = of_at * jnp.exp(on.vector(vectors["tail"]) + on.vector(vectors["momentum_at"]))
    of_tail = of_at
    for name in ("carried_at", "carried_before"):
        if name not in of:
            continue
        terms = on.along_rows(of[name], ROWS) * _carried_terms(on, vectors, name)
        read = "running" if name == "carried_at" else None
        more = pull_pairs(on, terms, work, read=read)
        of_decay = more if of_decay is None else of_decay + more
        # the same terms, [j, t]
        held[...] = of[name]
        inside = (lambda j, t: t >= j) if read else (lambda j, t: t > j)
        logs = on.along_columns(vectors["at" if read else "before"])
        logs = logs - on.along_rows(vectors["at"], ROWS)
        logs = logs + on.along_rows(vectors["momentum_at"], ROWS)
        terms = jnp.exp(on.masked(logs, inside, other=-jnp.inf)) * on.along_columns(held)
        of_at = of_at + jnp.sum(terms, axis=1)
    held[...] = of["write_end"]
    logs = on.along_rows(vectors["momentum_at"], ROWS) + on.along_rows(vectors["tail"], ROWS)
    logs = logs - on.along_columns(vectors["momentum_at"])
    terms = jnp.exp(on.masked(logs, lambda j, i: i <= j, other=-jnp.inf)) * on.along_columns(held)
    of_tail = of_tail + jnp.sum(terms, axis=1)
    total = total + pull_pairs(on, terms, work, read="running")
    return of_decay, of_tail, total + on.sums(of_at, held, lambda i, j: j >= i)


def _shrink(said):
    """One over the norm of each token."""
    return lax.rsqrt(jnp.sum(said * said, axis=1) + _SMALL)


class Cotangents(NamedTuple):
    """Of a chunk's context, summed over the memories that learned it.

    Attributes:
      keys: [64, 64].
      values: [64, 64].
      vectors: those of `gpu_cell.GRADIENTS` that were given, each [64].
    """

    keys: Any
    values: Any
    vectors: dict[str, Any]


def pull_generate(
    context: Context, of: Cotangents, generated, vectors, work, pull: Callable, give: Callable
) -> None:
    """Pull the cotangents of a context back to the memories that made it and to their inputs.

    Args:
      context: with the inputs in its tiles.
      of: see `Cotangents`.
      generated: the tile of the generated keys.
      vectors: those of `generate`.
      work: a tile.
      pull: `pull(memory, of_said)` adds to the cotangents of the memory in `context.matrices` and
        returns that of its input.
      give: takes "x_keys" and "x_values", and for "learning_rate" and "decay" the products of the
        logits' cotangents and what was said, whose sums are the gradients of the weights, and the
        cotangents themselves; with momentum "momentum", those of its logs.
    """
    on, rule = context.on, context.rule
    eta, size = on.vector(vectors["learning_rate"]), on.vector(vectors["size"])
    of_eta, of_size, of_keys = of.vectors["learning_rate"], of.vectors.get("size"), of.keys
    if "erase" in of.vectors:
        more, of_norm = pull_erase(eta, size, rule, of.vectors["erase"])
        of_eta, of_size = of_eta + more, of_norm if of_size is None else of_size + of_norm
    if of_size is not None:
        of_keys = of_keys + 2.0 * on.along_rows(of_size, ROWS) * on.get(generated)
    shrink = _shrink(context.say(KEY))
    along = jnp.sum(of_keys * on.get(generated), axis=1)
    of_keys = of_keys - on.along_rows(along, ROWS) * on.get(generated)
    of_inputs = pull(KEY, on.along_rows(shrink, ROWS) * of_keys)
    numbers, of_decay = dict(of.vectors), None
    if "momentum_at" in vectors:
        of_decay, more, of_momentum = _pull_momentum(context, numbers, vectors, work)
        numbers["tail"] = numbers["tail"] + more if "tail" in numbers else more
        give("momentum", None, of_momentum)
    share = eta * (1.0 / rule.max_learning_rate)
    of_logits = {"learning_rate": of_eta * eta * (1.0 - share)}
    for memory, name in ((LEARNING_RATE, "learning_rate"), (DECAY, "decay")):
        said = context.say(memory)
        if name == "decay":
            decay = context.gate(name, said)
            of_logit = _of_logs(context, numbers)
            of_logit = (of_logit if of_decay is None else of_logit + of_decay) * (1.0 - decay)
            of_logits[name] = jnp.where(decay > _LEAST, of_logit, 0.0)
        of_logit = of_logits[name]
        give(name, on.along_rows(of_logit, ROWS) * said, of_logit)
        weights = on.along_columns(context.readout[name])
        of_inputs = of_inputs + pull(memory, on.along_rows(of_logit, ROWS) * weights)
    give("x_keys", of_inputs)
    context.begin(VALUE)
    give("x_values", pull(VALUE, of.values))


def _of_logs(context: Context, of):
    """The cotangent of the logs of decay, as `gpu_vectors.of_logs`."""
    on, held = context.on, context.held
    total = on.sums(of["total"], held, lambda i, j: j >= 0)
    total = total + on.sums(of["tail"], held, lambda i, j: j < i)
    if "at" in of:
        total = total + on.sums(of["at"], held, lambda i, j: j >= i)
    if "before" in of:
        total = total + on.sums(of["before"], held, lambda i, j: j > i)
    return total + of["pairs"] if "pairs" in of else total
