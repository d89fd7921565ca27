"""Delta momentum: a memory of gradients that erases what it holds about the present one (B4)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, plus_identity, unfold, widened
from nestedjax.optim.memories import Memory, Part, momentum
from nestedjax.optim.parts import PyTree, Rate, add_decay, choice, number
from nestedjax.optim.preconditioned_momentum import Preconditioner, preconditioners
from pallas_kernels import solve

_POWER_STEPS = 8


class DeltaMomentumState(NamedTuple):
    """The state of `scale_by_delta_momentum`: the momentum, and what scales the gradients."""

    trace: PyTree
    write: PyTree

    def memories(self) -> tuple[Memory | Part, ...]:
        """Its boxes: the momentum, and what its preconditioner remembers."""
        return momentum(self.trace), Part(self.write)


def delta_momentum(
    learning_rate: Rate,
    *,
    decay: Any = 0.9,
    erase: Any = 0.5,
    preconditioner: Preconditioner = "identity",
    normalize_key: bool = True,
    implicit: bool = False,
    key: str = "gradient",
    vector_as: str = "elementwise",
    weight_decay: Any = 0.0,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum by one step on `1/2 |m k^T + P|_F^2`, for parameters of any shape.

        m <- m (decay I - erase k^T k) - lr P(g),     W <- W + m - lr weight_decay W

    with m, g [outputs, inputs] and k = g / |g|_F. `implicit` solves for the minimum in its place:
    `m <- (decay m - lr P(g)) (I + erase k^T k)^-1`.

    Args:
      learning_rate: a rate or schedule, inside the memory.
      decay: of the momentum.
      erase: zeta; at most `decay` in the explicit form with normalised keys, which keeps the
        eigenvalues of the memory in [decay - erase, decay].
      preconditioner: P; see `preconditioned_momentum`.
      normalize_key: False: k = g as printed; diverges in the explicit form where |g|^2 > 2/erase.
      implicit: the exact minimiser; any erase >= 0 is stable.
      key: "gradient", or "rank1": only the largest singular direction of k erases (cheaper).
      vector_as: parameters that are no matrices: "elementwise" m (decay - erase k^2), or k "row":
        m decay - erase (m.k) k, or "col": m (decay - erase |k|^2).
      weight_decay: decoupled, of every parameter.
      axes: which parameters are matrices, and how; see `m3`.

    Raises:
      ValueError: an argument out of range, or axes that do not fit a parameter, by its name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.delta_momentum(0.1)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Nested Learning (arXiv 2512.24695), equations 48-49.

    Departures from the paper:
      1. The printed target +P climbs; it is -P here.
      2. NeurIPS multiplies by g^T g from the left, which fits square matrices only; right here.
      3. The key is normalised (`normalize_key`): |g|^2 has no bound, so that the printed step
         diverges on large gradients and does nothing on small ones.
      4. `erase` is a rate of its own; the paper has 1.
    """
    write = optax.chain(
        preconditioners(preconditioner, axes), optax.scale_by_learning_rate(learning_rate)
    )
    rule = scale_by_delta_momentum(
        decay=decay,
        erase=erase,
        preconditioner=write,
        normalize_key=normalize_key,
        implicit=implicit,
        key=key,
        vector_as=vector_as,
        axes=axes,
    )
    return widened(optax.chain(rule, add_decay(learning_rate, weight_decay)))


def scale_by_delta_momentum(
    *,
    decay: Any = 0.9,
    erase: Any = 0.5,
    preconditioner: Preconditioner = "identity",
    normalize_key: bool = True,
    implicit: bool = False,
    key: str = "gradient",
    vector_as: str = "elementwise",
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`m <- m (decay I - erase k^T k) + P(g)` of `delta_momentum`, whose arguments these are."""
    number("decay", decay)
    bounded = normalize_key and not implicit and isinstance(decay, int | float)
    number("erase", erase, 0.0, decay if bounded else float("inf"))
    choice("key", key, ("gradient", "rank1"))
    choice("vector_as", vector_as, ("elementwise", "row", "col"))
    write = preconditioners(preconditioner, axes)

    def remember(layout: Layout | None, g: jax.Array, value: jax.Array, m: jax.Array):
        arrays, back = _as_matrices(layout, vector_as, g, value, m)
        keys, value, m = arrays
        if normalize_key:
            keys = keys / (_norm(keys, back is None) + 1e-12)
        if back is None:
            return (_elementwise(m, keys, value, decay, erase, implicit),)
        if key == "rank1":
            keys = _largest(keys)
        step = _implicit if implicit else _explicit
        return (back(step(m, keys, value, decay, erase)),)

    def init(params: PyTree) -> DeltaMomentumState:
        return DeltaMomentumState(jax.tree.map(jnp.zeros_like, params), write.init(params))

    def update(updates, state, params=None, **extra):
        values, written = write.update(updates, state.write, params, **extra)
        (trace,) = on_leaves(remember, axes, updates, values, state.trace)
        return trace, DeltaMomentumState(trace, written)

    return widened(optax.GradientTransformationExtraArgs(init, update))


def _as_matrices(layout: Layout | None, vector_as: str, *arrays: jax.Array):
    """The arrays as matrices [..., outputs, inputs], and the way back; None for elementwise."""
    if layout is not None:
        return [fold(a, layout) for a in arrays], lambda m: unfold(m, layout)
    if vector_as == "elementwise":
        return list(arrays), None
    shape = (1, -1) if vector_as == "row" else (-1, 1)
    return [a.reshape(shape) for a in arrays], lambda m: m.reshape(arrays[0].shape)


def _norm(x: jax.Array, whole: bool) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=None if whole else (-2, -1), keepdims=True))


def _elementwise(m, k, value, decay, erase, implicit):
    if implicit:
        return (decay * m + value) / (1 + erase * k * k)
    return m * (decay - erase * k * k) + value


def _explicit(m, k, value, decay, erase):
    rows, columns = k.shape[-2:]
    seen = (m @ k.mT) @ k if rows <= columns else m @ (k.mT @ k)
    return decay * m - erase * seen + value


def _implicit(m, k, value, decay, erase):
    """`B (I + erase k^T k)^-1` on the smaller side of k."""
    b = decay * m + value
    rows, columns = k.shape[-2:]
    if rows < columns:
        small = plus_identity(erase * (k @ k.mT))
        return b - erase * (b @ k.mT) @ solve(small, k)
    small = plus_identity(erase * (k.mT @ k))
    return solve(small, b.mT).mT


def _largest(k: jax.Array) -> jax.Array:
    """The row s v^T [..., 1, inputs] of the largest singular value, by power iteration."""
    sizes = jnp.sum(k * k, axis=-1, keepdims=True)
    v = jnp.take_along_axis(k, jnp.argmax(sizes, axis=-2, keepdims=True), axis=-2)

    def step(_, v: jax.Array) -> jax.Array:
        v = v / (_norm(v, False) + 1e-30)
        return (v @ k.mT) @ k

    v = jax.lax.fori_loop(0, _POWER_STEPS, step, v)
    return jnp.sqrt(_norm(v, False)) * v / (_norm(v, False) + 1e-30)
