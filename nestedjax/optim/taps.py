"""Linear layers that hand their inputs to the optimizer, through the gradient of a zero parameter.

Delta gradient descent needs `C = X^T X / n` of a layer's inputs besides its gradient. A tapped
layer has one more parameter, its tap, which is zero, adds nothing, is never updated, and whose
"gradient" is C. So C goes wherever gradients go: through scans over stacked layers, accumulation,
sharding and `optax` transformations.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def tapped_linear(
    x: jax.Array,
    kernel: jax.Array,
    tap: jax.Array,
    *,
    contracted: int = 1,
    rows: int | None = None,
    rank1_rate: float | None = None,
) -> jax.Array:
    """`x . kernel`; the tap's gradient is `X^T X / n`.

    Args:
      x: inputs [..., *inputs].
      kernel: [*inputs, *outputs].
      tap: zeros [di, di], di the product of the inputs' sizes.
      contracted: how many axes the inputs have.
      rows: n; None: rows of x. Give it under `jax.vmap`, where a layer sees a part of them. The
        loss has to be a mean over the same rows, so that C and the gradient agree in scale.
      rank1_rate: weight each row by `1 / (1 + rate |x|^2)`, in C and in the kernel's gradient: for
        `dgd(batch="mean_of_rank1")` with this rate. The kernel's gradient then is not the loss's.

    Returns:
      [..., *outputs].

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x, kernel = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.ones((2, 1))
      >>> loss = lambda tap: tapped_linear(x, kernel, tap).mean()
      >>> jax.grad(loss)(jnp.zeros((2, 2))).tolist()
      [[5.0, 1.0], [1.0, 2.0]]

    Reference:
      Nested Learning (arXiv 2512.24695), appendix C, for what the inputs are needed for.
    """
    size = _size(kernel.shape[:contracted])
    if x.shape[x.ndim - contracted :] != kernel.shape[:contracted] or tap.shape != (size, size):
        raise ValueError(
            f"inputs {x.shape}, kernel {kernel.shape} and tap {tap.shape} do not fit: with"
            f" contracted={contracted} the tap is [{size}, {size}]"
        )
    return _linear(x, kernel, tap, contracted, rows, rank1_rate)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _linear(x, kernel, tap, contracted, rows, rank1_rate):
    return jnp.tensordot(x, kernel, axes=contracted)


def _linear_fwd(x, kernel, tap, contracted, rows, rank1_rate):
    return _linear(x, kernel, tap, contracted, rows, rank1_rate), (x, kernel, tap)


def _linear_bwd(contracted, rows, rank1_rate, saved, dy):
    x, kernel, tap = saved
    leading = x.ndim - contracted
    produced = dy.ndim - leading
    back = tuple(range(leading, dy.ndim)), tuple(range(contracted, kernel.ndim))
    dx = jnp.tensordot(dy, kernel, axes=back)
    flat = x.reshape(-1, tap.shape[-1]).astype(tap.dtype)
    weighted = flat
    if rank1_rate is not None:
        weighted = flat / (1 + rank1_rate * jnp.sum(flat * flat, axis=-1, keepdims=True))
    inputs = x if rank1_rate is None else weighted.astype(x.dtype).reshape(x.shape)
    axes = tuple(range(leading))
    dkernel = jnp.tensordot(inputs, dy, axes=(axes, axes))
    assert dkernel.ndim == contracted + produced
    gram = weighted.T @ flat / (flat.shape[0] if rows is None else rows)
    return dx, dkernel.astype(kernel.dtype), gram


_linear.defvjp(_linear_fwd, _linear_bwd)


def tapped_embedding(
    tokens: jax.Array, table: jax.Array, tap: jax.Array, *, rows: int | None = None
) -> jax.Array:
    """The rows of the table that `tokens` name; the tap's gradient is each token's share of them.

    An embedding is a linear layer on one-hot inputs, whose `X^T X / n` is diagonal.

    Args:
      tokens: integers [...].
      table: [vocabulary, features].
      tap: zeros [vocabulary].
      rows: n; see `tapped_linear`.

    Raises:
      ValueError: a tap of another length than the table.
    """
    if tap.shape != table.shape[:1]:
        raise ValueError(f"tap {tap.shape} does not fit the table {table.shape}: one number a row")
    return _embedding(tokens, table, tap, rows)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _embedding(tokens, table, tap, rows):
    return jnp.take(table, tokens, axis=0)


def _embedding_fwd(tokens, table, tap, rows):
    return _embedding(tokens, table, tap, rows), (tokens, table, tap)


def _embedding_bwd(rows, saved, dy):
    tokens, table, tap = saved
    dtable = jnp.zeros_like(table).at[tokens].add(dy.astype(table.dtype))
    share = jnp.ones((), tap.dtype) / (tokens.size if rows is None else rows)
    return None, dtable, jnp.zeros_like(tap).at[tokens].add(share)


_embedding.defvjp(_embedding_fwd, _embedding_bwd)


def recorded_linear(x: jax.Array, kernel: jax.Array, record: Any) -> jax.Array:
    """`x @ kernel`, whose `record` of zeros has the layer's inputs and output errors as gradient.

    Args:
      x: inputs [n, di].
      kernel: [di, do].
      record: a pair of zeros, [n, di] and [n, do]; see `ggd`.
    """
    inputs, outputs = record
    return _recorded(x, kernel, inputs) + outputs


@jax.custom_vjp
def _recorded(x, kernel, record):
    return x @ kernel


def _recorded_fwd(x, kernel, record):
    return x @ kernel, (x, kernel)


def _recorded_bwd(saved, dy):
    x, kernel = saved
    return dy @ kernel.T, x.T @ dy, x


_recorded.defvjp(_recorded_fwd, _recorded_bwd)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
