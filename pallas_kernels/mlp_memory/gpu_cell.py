"""What one chunk writes into a deep memory of 64 x 64 matrices, and its pull; on one warpgroup.

With K, X the keys and values of a chunk (tokens are rows), V and U the matrices at its start,

    B = K V^T,   H = s(B),   E = c_E (K + H U^T - target),   G = (E U) * s'(B),

c_E, c_U and c_V the clips of the error and of the gradients E^T H and G^T K. V then follows the
delta rule with inputs K and errors c_V G, U with H and c_U E: their clips scale the learning rates.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels._gpu.tiles import ROWS, Flipped, Warpgroup
from pallas_kernels.delta_rule.gpu_chunk import Chunk
from pallas_kernels.mlp_memory.types import Rule

_BEND, _CUBIC = math.sqrt(2 / math.pi), 0.044715
_LEAST = 1e-12  # of a squared norm
# Numbers of a token, as those of the delta rule's kernel; "erase" is that of the inner matrix and
# "size" the squared norm of its key.
VECTORS = ("learning_rate", "erase", "size", "at", "before", "tail", "total")
_OWN = ("learning_rate", "erase", "size")  # the others are those of both delta rules


def _share(z):
    """GELU's s(z) / z, in the tanh form, and its derivative, from one exponential."""
    squared = z * z
    share = lax.logistic((2 * _BEND) * z * (1.0 + _CUBIC * squared))
    bend = _BEND * (1.0 + 3.0 * _CUBIC * squared)
    return share, 2.0 * share * (1.0 - share) * bend


def gelu(z):
    """s(z), the tanh form."""
    return z * _share(z)[0]


def gelu_and_slope(z):
    """s(z) and s'(z)."""
    share, rise = _share(z)
    return z * share, share + z * rise


def curvature(z):
    """s''(z)."""
    share, rise = _share(z)
    bend = _BEND * (1.0 + 3.0 * _CUBIC * z * z)
    bow = 2.0 * share * (1.0 - share) * (6.0 * _BEND * _CUBIC) * z
    return 2.0 * rise + z * (2.0 * rise * (1.0 - 2.0 * share) * bend + bow)


def clip_of(squared, rule: Rule):
    """The factor that bounds a norm, given squared, by `inner_clip`; None without a bound."""
    if rule.inner_clip is None:
        return None
    return jnp.minimum(1.0, rule.inner_clip * lax.rsqrt(squared + _LEAST))


def pull_clip(squared, rule: Rule, of_clip):
    """The cotangent of the squared norm."""
    assert rule.inner_clip is not None
    clip = rule.inner_clip * lax.rsqrt(squared + _LEAST)
    return jnp.where(clip < 1.0, -0.5 * of_clip * clip / (squared + _LEAST), 0.0)


def erase_of(eta, squared, rule: Rule):
    """How much is erased along an input of a squared norm."""
    strength = eta * squared
    return eta / (1.0 + strength if rule.erase == "implicit" else jnp.maximum(1.0, strength))


def pull_erase(eta, squared, rule: Rule, of_erase):
    """The cotangents of the learning rate and of the squared norm."""
    if rule.erase == "implicit":
        share = of_erase / (1.0 + eta * squared)
        of_strength = -share * eta / (1.0 + eta * squared)
    else:
        share = of_erase / jnp.maximum(1.0, eta * squared)
        of_strength = jnp.where(eta * squared > 1.0, -share / squared, 0.0)
    return share + of_strength * squared, of_strength * eta


class Norms(NamedTuple):
    """Squared norms of tokens, each [64].

    Attributes:
      raw: of the error before its clip.
      error: of E.
      hidden: of H.
      steep: of G.
    """

    raw: Any
    error: Any
    hidden: Any
    steep: Any


class Cell(NamedTuple):
    """A chunk of one memory: references to tiles [64, 64] in shared memory, but for three.

    Attributes:
      on: the warpgroup.
      rule: see `Rule`.
      keys: K.
      inner: V at the chunk's start.
      outer: U at the chunk's start.
      error: takes E.
      steep: takes G.
      vectors: each of `VECTORS`, with momentum those of `gpu_momentum`, too.
      theta: with momentum a tile that its delta rules fill, as the next.
      written: see `theta`.
    """

    on: Warpgroup
    rule: Rule
    keys: Any
    inner: Any
    outer: Any
    error: Any
    steep: Any
    vectors: dict[str, Any]
    theta: Any = None
    written: Any = None

    def scaled(self, vector, matrix):
        """Rows times numbers; None is one."""
        return matrix if vector is None else self.on.along_rows(vector, ROWS) * matrix

    def before(self):
        """B."""
        return self.on.product((self.keys, Flipped(self.inner)))

    def write(self, values, hidden) -> Norms:
        """Fill E, G and, in the tile `hidden`, H from the tile of values."""
        on, rule = self.on, self.rule
        target = on.get(values)
        if rule.values == "self":
            of_values = gelu(on.product((values, Flipped(self.inner))))
            target = target + on.product((on.split(of_values), Flipped(self.outer)))
        error = -target
        found = gelu(self.before())
        on.put(hidden, found)
        size = jnp.sum(found * found, axis=1)
        if self.outputs:
            out = on.product((hidden, Flipped(self.outer)))
            error = error + self.outputs * out
        if rule.objective == "l2":
            error = error + on.get(self.keys)
        raw = jnp.sum(error * error, axis=1)
        error = self.scaled(clip_of(raw, rule), error)
        on.put(self.error, error)
        return Norms(raw, jnp.sum(error * error, axis=1), size, self.fill_steep())

    @property
    def outputs(self) -> float:
        """How often H U^T is in the error; "functional" adds one, the gradient of 1/2 |U H|^2."""
        return 1.0 * (self.rule.objective == "l2") + (self.rule.dgd == "functional")

    def fill_steep(self):
        """Fill G, given E; returns its squared norms."""
        on = self.on
        found = on.product((self.error, self.outer)) * gelu_and_slope(self.before())[1]
        on.put(self.steep, found)
        return jnp.sum(found * found, axis=1)

    def clips(self, norms: Norms):
        """c_V and c_U, which bound the gradients of the inner and the outer matrix."""
        inner = norms.steep * self.on.vector(self.vectors["size"])
        return clip_of(inner, self.rule), clip_of(norms.error * norms.hidden, self.rule)

    def chunks(self, norms: Norms, hidden, *, read: str | None) -> tuple[Chunk, Chunk]:
        """The delta rules of V and U, without queries; `hidden` holds H."""
        on, rule = self.on, self.rule
        sums = {name: vector for name, vector in self.vectors.items() if name not in _OWN}
        tiles = {"theta": self.theta, "written": self.written}
        eta = on.vector(self.vectors["learning_rate"])
        etas = [eta if clip is None else eta * clip for clip in self.clips(norms)]
        running = None if read == "anchor" else read
        erases = [self.vectors["erase"], erase_of(eta, norms.hidden, rule)]
        inner, outer = (
            {"learning_rate": eta, "erase": erase} | sums
            for eta, erase in zip(etas, erases, strict=True)
        )
        erases_inner, erases_outer = erases_of(rule)
        return (
            Chunk(on, True, erases_inner, running, self.keys, self.steep, inner, **tiles),
            Chunk(on, True, erases_outer, running, hidden, self.error, outer, **tiles),
        )


def erases_of(rule: Rule) -> tuple[bool, bool]:
    """Whether V and U erase along their inputs."""
    return rule.dgd in ("layerwise", "input_only"), rule.dgd == "layerwise"


def predict(on: Warpgroup, z, matrices):
    """M(z) = z + U s(V z) of a tile; `matrices` are V and U, tiles."""
    inner, outer = matrices
    hidden = gelu(on.product((z, Flipped(inner))))
    return on.get(z) + on.product((on.split(hidden), Flipped(outer)))


def pull_predict(on: Warpgroup, z, matrices, of_out, work):
    """The cotangents of V, of U, and of z through U s(V z), given that of the output in a tile.

    `work` is two tiles.
    """
    inner, outer = matrices
    hidden, slope = gelu_and_slope(on.product((z, Flipped(inner))))
    on.put(work[0], hidden)
    of_outer = on.product((Flipped(of_out), work[0]))
    on.put(work[1], on.product((of_out, outer)) * slope)
    return on.product((Flipped(work[1]), z)), of_outer, on.product((work[1], inner))


class Pulled(NamedTuple):
    """Cotangents that the two delta rules gave, in tiles: of E, of G, of H and of K."""

    error: Any
    steep: Any
    hidden: Any
    keys: Any


def pull_write(cell: Cell, norms: Norms, of: Pulled, backs, values, work, give: Callable):
    """Pull cotangents of E, G and H back to the keys, the values and the matrices.

    Args:
      cell: with E; G is not needed any more.
      norms: of its tokens.
      of: see `Pulled`.
      backs: cotangents of V and U so far, values.
      values: a tile of the values.
      work: four tiles.
      give: takes "keys" and "values", in this order, each with its gradient.

    Returns:
      The cotangents of V and U.
    """
    on, rule = cell.on, cell.rule
    of_inner, of_outer = backs
    before, of_steep = cell.before(), on.get(of.steep)
    on.put(work[0], of_steep * gelu_and_slope(before)[1])
    on.put(work[1], of_steep * on.product((cell.error, cell.outer)) * curvature(before))
    of_error = on.get(of.error) + on.product((work[0], Flipped(cell.outer)))
    of_outer = of_outer + on.product((Flipped(cell.error), work[0]))
    on.put(work[3], _unclipped(cell, norms, of_error))
    of_hidden = on.get(of.hidden)
    hidden, slope = gelu_and_slope(cell.before())
    if cell.outputs:
        on.put(work[2], cell.outputs * hidden)
        of_outer = of_outer + on.product((Flipped(work[3]), work[2]))
        of_hidden = of_hidden + cell.outputs * on.product((work[3], cell.outer))
    on.put(work[1], on.get(work[1]) + of_hidden * slope)
    of_inner = of_inner + on.product((Flipped(work[1]), cell.keys))
    of_keys = on.get(of.keys) + on.product((work[1], cell.inner))
    if rule.objective == "l2":
        of_keys = of_keys + on.get(work[3])
    give("keys", of_keys)
    of_values = -on.get(work[3])
    if rule.values == "self":
        hidden, slope = gelu_and_slope(on.product((values, Flipped(cell.inner))))
        on.put(work[2], hidden)
        of_outer = of_outer - on.product((Flipped(work[3]), work[2]))
        on.put(work[1], -on.product((work[3], cell.outer)) * slope)
        of_inner = of_inner + on.product((Flipped(work[1]), values))
        of_values = of_values + on.product((work[1], cell.inner))
    give("values", of_values)
    return of_inner, of_outer


def _unclipped(cell: Cell, norms: Norms, of_error):
    """The cotangent of the error before its clip."""
    clip = clip_of(norms.raw, cell.rule)
    if clip is None:
        return of_error
    error = cell.on.get(cell.error)
    of_clip = jnp.sum(of_error * error, axis=1) / clip
    of_raw = pull_clip(norms.raw, cell.rule, of_clip)
    return cell.scaled(clip, of_error) + cell.scaled(2.0 * of_raw / clip, error)
