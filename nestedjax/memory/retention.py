"""Retention: how a memory keeps what it held while it writes.

Every retention here is a linear recurrence of an accumulator, followed by a map to weights:

    A_t = decay_t A_{t-1} + S_t,    W_t = link(A_t)

with `S_t = -learning_rate_t gradient_t` where there is no momentum. What is meta-learned is `A_0`
(for the simplex the free parameter of a softmax). `elastic_net` shrinks after every write instead:
`W_t = shrink(decay_t W_{t-1} + S_t)`.

| function | regulariser | `link` |
|---|---|---|
| `none` | `1/2 |W - W'|^2` | identity, decay = 1 |
| `decay` | `1/2 |W - decay W'|^2` | identity |
| `kl` | KL on the scaled simplex, row by row | `scale softmax(A)` over the key axis |
| `elastic_net` | quadratic + l1 | soft threshold after each write |
| `lq` | `1/2 |W|_q^2` (FTRL) | `sign(A) |A|^(p-1) / |A|_p^(p-2)`, 1/p + 1/q = 1 |
| `lq_printed` | as printed in MIRAS | `A / |A|_q^(q-2)`, a mirror map for q = 2 only |
| `bregman_sigmoid` | Bregman divergence of the binary entropy | `sigmoid(A)` |
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax.errors import require_range

Matrix = Float[Array, "*w"]  # the shape of the weights, whatever it is
Number = Float[Array, ""]

# Smooths |A|^(p-2) at A = 0, where its derivative is infinite for p < 2.
_EPSILON = 1e-12


class Retention(NamedTuple):
    """How a memory keeps what it held.

    Attributes:
      name: what tables and errors call it.
      decay: whether `Tokens.decay` is "required", "optional" (1 without it) or "unused".
      link: accumulator -> weights for one matrix [m, n]; None is the identity.
      shrink: `shrink(weight[m, n], learning_rate[]) -> weight`, applied after every write; or None.
    """

    name: str
    decay: Literal["required", "optional", "unused"]
    link: Callable[[Matrix], Matrix] | None = None
    shrink: Callable[[Matrix, Number], Matrix] | None = None


def none() -> Retention:
    """Everything is kept: `W_t = W_{t-1} + S_t`."""
    return Retention("none", decay="unused")


def decay() -> Retention:
    """A fraction is kept: `W_t = decay_t W_{t-1} + S_t`."""
    return Retention("decay", decay="required")


def kl(scale: float = 1.0) -> Retention:
    """KL divergence on the scaled simplex: `W_t = scale softmax(decay_t log W_{t-1} + S_t)`.

    Every row of every weight matrix is non-negative and sums to `scale`. The coefficients of the
    proximal form (learning rate eta, strength a) are `proximal_coefficients(eta, a)`.

    Raises:
      ValueError: scale <= 0.

    Reference: MIRAS (arXiv 2504.13173), Memora.
    """
    require_range("kl: scale", scale, 0, closed="neither")
    # decay log W differs from decay A by a constant in each row, which softmax ignores.
    return Retention("kl", decay="optional", link=lambda a: scale * jax.nn.softmax(a, axis=-1))


def elastic_net(sparsity: float) -> Retention:
    """Quadratic plus l1 retention: `W_t = soft(decay_t W_{t-1} + S_t, learning_rate_t sparsity)`.

    The minimiser of `<W, g> + 1/(2 eta) |W - W'|^2 + 1/(2b) |W|^2 + sparsity |W|_1` has
    `learning_rate, decay = proximal_coefficients(eta, b)`.

    Raises:
      ValueError: sparsity < 0.
    """
    require_range("elastic_net: sparsity", sparsity, 0)

    def shrink(weight: Matrix, learning_rate: Number) -> Matrix:
        return jnp.sign(weight) * jnp.maximum(jnp.abs(weight) - learning_rate * sparsity, 0.0)

    return Retention("elastic_net", decay="optional", shrink=shrink)


def _size(a: Matrix) -> Number:
    """What to divide A by before it is raised to a power, so that its norm is about 1.

    A constant to autodiff: the links do not depend on it.
    """
    return jnp.maximum(jax.lax.stop_gradient(jnp.max(jnp.abs(a))), _EPSILON**0.5)


def lq(q: float) -> Retention:
    """Mirror map of `1/2 |W|_q^2`: `W = sign(A) |A|^(p-1) / |A|_p^(p-2)` with 1/p + 1/q = 1.

    Raises:
      ValueError: q <= 1 (no dual norm).
    """
    require_range("lq: q", q, 1, closed="neither")
    p = q / (q - 1)

    def link(a: Matrix) -> Matrix:
        size = _size(a)
        square = (a / size) ** 2 + _EPSILON / size / size
        norm = jnp.sum(square ** (p / 2)) ** (1 / p)
        # sign(A) |A|^(p-1) without a sign, whose derivative would be 0
        return a * square ** ((p - 2) / 2) / norm ** (p - 2)

    return Retention("lq", decay="optional", link=link)


def lq_printed(q: float) -> Retention:
    """The lq retention as MIRAS prints it: `W = A / |A|_q^(q-2)`.

    This is a mirror map for q = 2 only; it is here to compare with the published Moneta (q = 4).

    Raises:
      ValueError: q <= 1.
    """
    require_range("lq_printed: q", q, 1, closed="neither")

    def link(a: Matrix) -> Matrix:
        size = _size(a)
        norm = jnp.sum(((a / size) ** 2 + _EPSILON / size / size) ** (q / 2)) ** (1 / q)
        return (a / size) / norm ** (q - 2) * size ** (3 - q)

    return Retention("lq_printed", decay="optional", link=link)


def bregman_sigmoid() -> Retention:
    """Weights in (0, 1): `W_t = sigmoid(decay_t logit(W_{t-1}) + S_t)`."""
    return Retention("bregman_sigmoid", decay="optional", link=jax.nn.sigmoid)


def proximal_coefficients(
    learning_rate: Float[Array, "*b"] | float, strength: Float[Array, "*b"] | float
) -> tuple[Float[Array, "*b"] | float, Float[Array, "*b"] | float]:
    """Learning rate and decay of the update that solves a proximal problem.

    The minimiser of `<W, g> + D(W, W')/eta + G(W)/a` decays by `a / (a + eta)`, and its learning
    rate is eta times that: for D and G both quadratic (decay, elastic net), or KL and entropy.

    Args:
      learning_rate: eta, any shape.
      strength: a, scalar or of the shape of `learning_rate`.

    Returns:
      `(learning_rate, decay)` to be put into `Tokens`.
    """
    decay = strength / (strength + learning_rate)
    return learning_rate * decay, decay
