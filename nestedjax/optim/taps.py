"""Linear layers that hand their inputs to the optimizer, through the gradient of a zero parameter.

Delta gradient descent needs `C = X^T X / n` of a layer's inputs besides its gradient. A tapped
layer has one more parameter, its tap, which is zero, contributes nothing, is never updated, and
whose "gradient" is C. So C goes wherever gradients go: through scans over stacked layers,
accumulation, sharding and optax transformations. It is no gradient, though: what clips or counts
gradients leaves out the leaves that `taps_in` names: `clip_gradients`, `gradient_norm`.
"""

import math
import string
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from nestedjax.optim.ranges import checked
from nestedjax.optim.types import Positive, PyTree

TAP = "tap"


def taps_in(tree: PyTree) -> PyTree:
    """Which leaves of a tree like the parameters are taps: a tree of bool.

    Args:
      tree: parameters, gradients or updates; a leaf is a tap if "tap" is a name on its path.

    Example:
      >>> from nestedjax import optim
      >>> optim.taps_in({"kernel": 1.0, "tap": 0.0})
      {'kernel': False, 'tap': True}
    """
    return jax.tree.map_with_path(lambda path, _: TAP in names_of(path), tree)


def gradient_norm(gradients: PyTree) -> Float[Array, ""]:
    """The global norm of the gradients among the leaves: taps are none.

    Example:
      >>> import jax.numpy as jnp
      >>> float(gradient_norm({"kernel": jnp.array([3.0, 4.0]), "tap": jnp.array([100.0])}))
      5.0
    """
    return optax.tree.norm(_gradients_in(gradients))


@checked
def clip_gradients(largest: Positive) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` of the gradients; taps are neither counted nor scaled.

    Args:
      largest: the largest global norm.

    Raises:
      ValueError: it is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> tx, tree = clip_gradients(1.0), {"kernel": jnp.array([3.0, 4.0]), "tap": jnp.ones(1)}
      >>> clipped, _ = tx.update(tree, tx.init(tree))
      >>> clipped["kernel"].round(3).tolist(), clipped["tap"].tolist()
      ([0.6000000238418579, 0.800000011920929], [1.0])
    """
    clip = optax.clip_by_global_norm(largest)

    def update(updates: PyTree, params: PyTree = None) -> PyTree:
        clipped, _ = clip.update(_gradients_in(updates), clip.init(params))
        return jax.tree.map(lambda u, c: u if c is None else c, updates, clipped)

    return optax.stateless(update)


def _gradients_in(tree: PyTree) -> PyTree:
    """The tree with None in place of its taps."""
    return jax.tree.map(lambda leaf, tap: None if tap else leaf, tree, taps_in(tree))


def names_of(path: tuple[Any, ...]) -> list[str]:
    """The names on a leaf's path, from the root."""
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def watch_inputs(
    x: Float[Array, "..."],
    tap: Float[Array, "di di"],
    *,
    contracted: int = 1,
    rows: int | None = None,
) -> Float[Array, "..."]:
    """x itself, for the layer that follows; the tap's gradient is `X^T X / n`.

    Args:
      x: inputs [..., *inputs].
      tap: zeros [di, di], with di the product of the inputs' sizes.
      contracted: number of axes that the inputs have.
      rows: n; None: the number of inputs in x. Give it under `jax.vmap`, where a layer sees a part
        of them. The loss must be a mean over the same n inputs, so that C and the gradient agree in
        scale.

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
    # In the tap's precision: C is a sum over all tokens of a step, which bfloat16 cannot hold.
    wide = x.astype(tap.dtype)
    gram = jnp.einsum(
        f"{stack}{left},{stack}{right}->{left}{right}", wide, wide, out_sharding=where
    )
    return dx, gram.reshape(tap.shape) / (math.prod(x.shape[:lead]) if rows is None else rows)


_watch.defvjp(_watch_fwd, _watch_bwd)


def tapped_linear(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    tap: Float[Array, "di di"],
    *,
    contracted: int = 1,
    rows: int | None = None,
    rank1_learning_rate: float | None = None,
) -> Float[Array, "..."]:
    """`x . kernel`, watched by a tap; see `watch_inputs`.

    Args:
      x: inputs [..., *inputs].
      kernel: [*inputs, *outputs].
      tap: zeros [di, di].
      contracted: number of axes that the inputs have.
      rows: n; see `watch_inputs`.
      rank1_learning_rate: weight each input by `1 / (1 + rank1_learning_rate |x|^2)`, in C and in
        the kernel's gradient, for `dgd(batch="mean_of_rank1")` with this learning rate. The
        kernel's gradient is not the loss's then.

    Returns:
      [..., *outputs].

    Raises:
      ValueError: a tap of another size.

    Reference:
      Nested Learning (arXiv 2512.24695), appendix C, for what the inputs are needed for.
    """
    if rank1_learning_rate is None:
        x = watch_inputs(x, tap, contracted=contracted, rows=rows)
        return jnp.tensordot(x, kernel, axes=contracted)
    return _rank1(x, kernel, tap, contracted, rows, rank1_learning_rate)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _rank1(x, kernel, tap, contracted, rows, learning_rate):
    return jnp.tensordot(x, kernel, axes=contracted)


def _rank1_fwd(x, kernel, tap, contracted, rows, learning_rate):
    return _rank1(x, kernel, tap, contracted, rows, learning_rate), (x, kernel, tap)


def _rank1_bwd(contracted, rows, learning_rate, saved, dy):
    x, kernel, tap = saved
    lead = x.ndim - contracted
    _, back = jax.vjp(lambda x: jnp.tensordot(x, kernel, axes=contracted), x)
    flat = x.reshape(-1, tap.shape[-1]).astype(tap.dtype)
    weighted = flat / (1 + learning_rate * jnp.sum(flat * flat, axis=-1, keepdims=True))
    stack = tuple(range(lead))
    dkernel = jnp.tensordot(weighted.astype(x.dtype).reshape(x.shape), dy, axes=(stack, stack))
    gram = weighted.T @ flat / (flat.shape[0] if rows is None else rows)
    return *back(dy), dkernel.astype(kernel.dtype), gram


_rank1.defvjp(_rank1_fwd, _rank1_bwd)


def tapped_embedding(
    tokens: Int[Array, "..."],
    table: Float[Array, "vocab width"],
    tap: Float[Array, " vocab"],
    *,
    rows: int | None = None,
) -> Float[Array, "... width"]:
    """The rows of the table that `tokens` name; the tap's gradient is each token's frequency.

    An embedding is a linear layer on one-hot inputs, whose `X^T X / n` is diagonal: entry i is the
    fraction of the n tokens that are token i.

    Args:
      tokens: token ids [...].
      table: [vocab, width].
      tap: zeros [vocab].
      rows: n; see `watch_inputs`.

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


def recorded_linear(
    x: Float[Array, "n di"],
    kernel: Float[Array, "di do"],
    record: tuple[Float[Array, "n di"], Float[Array, "n do"]],
) -> Float[Array, "n do"]:
    """`x @ kernel`, with the layer's inputs and output errors as gradient of its `record`.

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
