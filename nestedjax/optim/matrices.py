"""Which parameters are matrices, and how each is laid out as one for the rules that need it.

The specification is optax's own, `optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)`:
the axes that a layer contracts with its input, and those it produces; every other axis is a stack
of independent matrices. The same labels therefore serve `optax.contrib.muon`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from nestedjax.optim.types import Leaf, Matrices, PyTree
from pallas_kernels import accumulation_dtype, unit

MatrixAxes = optax.contrib.MuonDimensionNumbers
Axes: TypeAlias = PyTree | Callable[[PyTree], PyTree] | None


class Layout(NamedTuple):
    """How one parameter is a stack of matrices [..., outputs, inputs].

    Attributes:
      name: of the parameter, for error messages.
      order: the parameter's axes in the order stack, outputs, inputs.
      split: the parameter's shape in that order.
      matrix: the shape [*stack, outputs, inputs], after all outputs and all inputs are merged.
      sharding: the parameter's sharding on a mesh with Explicit axes; else None.
    """

    name: str
    order: tuple[int, ...]
    split: tuple[int, ...]
    matrix: tuple[int, ...]
    sharding: NamedSharding | None = None


def last_two(params: PyTree) -> PyTree:
    """The default for a plain pytree: the last two axes are (inputs, outputs), the others stacks.

    Arrays with fewer than two axes are no matrices (None). A plain pytree does not say which of its
    arrays are embeddings, which are better left to AdamW: give `axes` where there are some.

    Example:
      >>> import jax.numpy as jnp
      >>> last_two({"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones(5)})["bias"] is None
      True
    """
    return jax.tree.map(lambda leaf: MatrixAxes(-2, -1) if leaf.ndim >= 2 else None, params)


def layouts(axes: Axes, params: PyTree) -> list[Layout | None]:
    """The layout of each leaf, in the order of the leaves; None where it is no matrix.

    Args:
      axes: a tree like the parameters, or a prefix of it, of `MatrixAxes` or None; or a function
        that makes it from the parameters; None is `last_two`. Parameters are looked up in it by
        their path, so that the tree of all parameters serves a masked part of them.
      params: arrays; masked ones may be missing.

    Raises:
      ValueError: a leaf that `axes` does not cover, or axes that do not fit it, by name.
    """
    axes = last_two(params) if axes is None else axes(params) if callable(axes) else axes
    known = dict(
        jax.tree_util.tree_leaves_with_path(
            axes, is_leaf=lambda a: a is None or isinstance(a, MatrixAxes)
        )
    )
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        cuts = [path[:cut] for cut in range(len(path), -1, -1) if path[:cut] in known]
        if not cuts:
            raise ValueError(f"axes say nothing about the parameter {named(path)!r}: add it")
        found.append(_layout(named(path), leaf, known[cuts[0]]))
    return found


def named(path: tuple[Any, ...]) -> str:
    """The path of a leaf as text, such as "blocks.mlp.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".") or "(the only one)"


def _layout(name: str, leaf: Any, axes: Any) -> Layout | None:
    if axes is None or math.prod(leaf.shape) == 0:  # without entries there is nothing to factorise
        return None
    if not isinstance(axes, MatrixAxes):
        raise ValueError(f"axes of {name!r} are {axes!r}: give MatrixAxes(inputs, outputs) or None")
    shape = leaf.shape
    given = [a if isinstance(a, tuple | list) else (a,) for a in (axes[1], axes[0])]
    if any(not -len(shape) <= a < len(shape) for group in given for a in group):
        raise ValueError(f"{name!r} has shape {shape}: it has no axes {axes}; label it None")
    outputs, inputs = ([a % len(shape) for a in group] for group in given)
    if len({*outputs, *inputs}) < len(outputs) + len(inputs) or not (outputs and inputs):
        raise ValueError(f"axes {axes} of {name!r} must name different axes of its shape {shape}")
    stack = [a for a in range(len(shape)) if a not in (*outputs, *inputs)]
    order = (*stack, *outputs, *inputs)
    rows, columns = (math.prod(shape[a] for a in group) for group in (outputs, inputs))
    matrix = (*(shape[a] for a in stack), rows, columns)
    return Layout(name, order, tuple(shape[a] for a in order), matrix, _explicit(leaf))


def _explicit(leaf: Any) -> NamedSharding | None:
    """The sharding of an array on a mesh with Explicit axes.

    There JAX refuses to merge axes of which one is split over devices, so that `fold` has to say
    where its result lies.
    """
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    types = getattr(getattr(sharding, "mesh", None), "axis_types", ()) or ()
    return sharding if AxisType.Explicit in types else None


def fold(leaf: Leaf, layout: Layout) -> Matrices:
    """A parameter as matrices, `y = matrix @ x`.

    On a mesh with Explicit axes each device gathers whole matrices for its part of the stack, since
    what follows (Newton-Schulz, factorizations) needs all of a matrix; on Auto axes the compiler
    decides.
    """
    leaf = leaf.transpose(layout.order)
    if layout.sharding is not None:
        stack = len(layout.matrix) - 2
        spec = [layout.sharding.spec[a] for a in layout.order[:stack]]
        leaf = jax.sharding.reshard(leaf, P(*spec, *[None] * (leaf.ndim - stack)))
    return leaf.reshape(layout.matrix)


def unfold(matrix: Matrices, layout: Layout) -> Leaf:
    """Matrices in the shape and sharding of their parameter: the inverse of `fold`."""
    leaf = matrix.reshape(layout.split)
    back = sorted(range(leaf.ndim), key=lambda i: layout.order[i])
    leaf = leaf.transpose(back)
    if layout.sharding is not None:
        leaf = jax.sharding.reshard(leaf, layout.sharding.spec)
    return leaf


def on_leaves(
    function: Callable, axes: Axes, tree: PyTree, *states: PyTree, outputs: int = 1
) -> tuple[PyTree, ...]:
    """Apply a function to every leaf and to what belongs to it.

    Args:
      function: `(layout, leaf, *parts of the states) -> tuple of values`, where the layout is None
        for a leaf that is no matrix.
      axes: see `layouts`.
      tree: arrays, in the parameters' shapes.
      states: trees whose structure begins with that of `tree`; at a leaf they may hold anything.
      outputs: how many values the function returns.

    Returns:
      For each value a tree with the structure of `tree`.
    """
    leaves = jax.tree.leaves(tree)
    treedef: Any = jax.tree.structure(tree)
    parts = [treedef.flatten_up_to(state) for state in states]
    results = [
        function(layout, leaf, *rest)
        for layout, leaf, *rest in zip(layouts(axes, tree), leaves, *parts, strict=True)
    ]
    columns = zip(*results, strict=True) if results else [[]] * outputs
    return tuple(treedef.unflatten(column) for column in columns)


def labels(axes: Axes) -> Callable[[PyTree], PyTree]:
    """`label(params)` -> a tree of "matrix" and "rest", for `optax.partition`."""

    def label(params: PyTree) -> PyTree:
        kinds = ["rest" if layout is None else "matrix" for layout in layouts(axes, params)]
        return jax.tree.unflatten(jax.tree.structure(params), kinds)

    return label


def widened(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with states and arithmetic in at least float32, and updates in the gradients' dtype.

    Every optimizer here is wrapped in it: a moving average with decay 0.95 in bfloat16, which has 8
    significant bits, loses increments smaller than about 1/256 of what it holds.

    Raises (in `init` and `update`):
      ValueError: a leaf that does not hold real floating-point numbers, by name.
    """
    tx = optax.with_extra_args_support(tx)

    def wide(tree: PyTree) -> PyTree:
        real(tree)
        return jax.tree.map(lambda a: a.astype(accumulation_dtype(a)), tree)

    def init(params: PyTree) -> PyTree:
        return tx.init(wide(params))

    def update(updates, state, params=None, **extra):
        high, state = tx.update(
            wide(updates), state, None if params is None else wide(params), **extra
        )
        return jax.tree.map(lambda u, g: u.astype(g.dtype), high, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def real(tree: PyTree) -> None:
    """Refuse leaves whose numbers an optimizer's arithmetic would cut: complex ones, integers.

    Raises:
      ValueError: there is one, by name.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            complex_ = jnp.issubdtype(dtype, jnp.complexfloating)
            fix = "train its real and its imaginary part" if complex_ else "mask it (optax.masked)"
            raise ValueError(f"{named(path)!r} is {dtype}; optimizers step real numbers: {fix}")


def normalized(x: Leaf, layout: Layout | None) -> Leaf:
    """A leaf with root mean square 1, matrix by matrix or as a whole; zero stays zero."""
    axes = tuple(range(x.ndim)) if layout is None else layout.order[len(layout.matrix) - 2 :]
    return unit(x, axes) * math.prod(x.shape[a] for a in axes) ** 0.5


def plus_identity(square: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """`I + square` for every matrix."""
    eye = jnp.eye(square.shape[-1], dtype=square.dtype)
    return jnp.broadcast_to(eye, square.shape) + square
