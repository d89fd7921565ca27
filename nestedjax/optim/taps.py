"""Linear layers that hand their inputs to the optimizer, through the gradient of a zero parameter.

Delta gradient descent needs `C = X^T X / n` of a layer's inputs besides its gradient. A tapped
layer has one more parameter, its tap, which is zero, adds nothing, is never updated, and whose
"gradient" is C. So C goes wherever gradients go: through scans over stacked layers, accumulation,
sharding and `optax` transformations.
"""

import math
import string
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def watch_inputs(
    x: jax.Array, tap: jax.Array, *, contracted: int = 1, rows: int | None = None
) -> jax.Array:
    """x itself, for the layer that follows; the tap's gradient is `X^T X / n`.

    Args:
      x: inputs [..., *inputs].
      tap: zeros [di, di], di the product of the inputs' sizes.
      contracted: how many axes the inputs have.
      rows: n; None: rows of x. Give it under `jax.vmap`, where a layer sees a part of them. The
        loss has to be a mean over the same rows, so that C and the gradient agree in scale.

    Raises:
      ValueError: a tap of another size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x, kernel = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.ones((2, 1))
      >>> loss = lambda tap: (watch_inputs(x, tap) @ kernel).mean()
      >>> jax.grad(loss)(jnp.zeros((2, 2))).tolist()
      [[5.0, 1.0], [1.0, 2.0]]
    """
    size = math.prod(x.shape[x.ndim - contracted :])
    if tap.shape != (size, size):
        raise ValueError(f"inputs {x.shape} and tap {tap.shape} do not fit: give [{size}, {size}]")
    return _watch(x, tap, contracted, rows)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _watch(x, tap, contracted, rows):
    return x


def _watch_fwd(x, tap, contracted, rows):
    return x, (x, tap)


def _watch_bwd(contracted, rows, saved, dx):
    x, tap = saved
    lead = x.ndim - contracted
    letters = string.ascii_lowercase
    stack, left, right = letters[:lead], letters[lead : x.ndim], letters[x.ndim :][:contracted]
    # On a mesh of Explicit axes a product over a split batch has to say where its result lies.
    mesh = jax.typeof(x).sharding.mesh
    explicit = AxisType.Explicit in (mesh.axis_types or ())
    where = NamedSharding(mesh, P(*[None] * (2 * contracted))) if explicit else None
    wide = x.astype(tap.dtype)
    gram = jnp.einsum(
        f"{stack}{left},{stack}{right}->{left}{right}", wide, wide, out_sharding=where
    )
    return dx, gram.reshape(tap.shape) / (math.prod(x.shape[:lead]) if rows is None else rows)


_watch.defvjp(_watch_fwd, _watch_bwd)


def tapped_linear(
    x: jax.Array,
    kernel: jax.Array,
    tap: jax.Array,
    *,
    contracted: int = 1,
    rows: int | None = None,
    rank1_rate: float | None = None,
) -> jax.Array:
    """`x . kernel`, watched by a tap; see `watch_inputs`.

    Args:
      x: inputs [..., *inputs].
      kernel: [*inputs, *outputs].
      tap: zeros [di, di].
      contracted: how many axes the inputs have.
      rows: n; see `watch_inputs`.
      rank1_rate: weight each row by `1 / (1 + rate |x|^2)`, in C and in the kernel's gradient: for
        `dgd(batch="mean_of_rank1")` with this rate. The kernel's gradient then is not the loss's.

    Returns:
      [..., *outputs].

    Raises:
      ValueError: a tap of another size.

    Reference:
      Nested Learning (arXiv 2512.24695), appendix C, for what the inputs are needed for.
    """
    if rank1_rate is None:
        x = watch_inputs(x, tap, contracted=contracted, rows=rows)
        return jnp.tensordot(x, kernel, axes=contracted)
    return _rank1(x, kernel, tap, contracted, rows, rank1_rate)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _rank1(x, kernel, tap, contracted, rows, rate):
    return jnp.tensordot(x, kernel, axes=contracted)


def _rank1_fwd(x, kernel, tap, contracted, rows, rate):
    return _rank1(x, kernel, tap, contracted, rows, rate), (x, kernel, tap)


def _rank1_bwd(contracted, rows, rate, saved, dy):
    x, kernel, tap = saved
    lead = x.ndim - contracted
    _, back = jax.vjp(lambda x: jnp.tensordot(x, kernel, axes=contracted), x)
    flat = x.reshape(-1, tap.shape[-1]).astype(tap.dtype)
    weighted = flat / (1 + rate * jnp.sum(flat * flat, axis=-1, keepdims=True))
    stack = tuple(range(lead))
    dkernel = jnp.tensordot(weighted.astype(x.dtype).reshape(x.shape), dy, axes=(stack, stack))
    gram = weighted.T @ flat / (flat.shape[0] if rows is None else rows)
    return *back(dy), dkernel.astype(kernel.dtype), gram


_rank1.defvjp(_rank1_fwd, _rank1_bwd)


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
