"""Feature maps of a gradient before a momentum stores it: phi(g) in place of g (spec B6)."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float

from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, unfold
from nestedjax.optim.parts import choice
from nestedjax.optim.ranges import Range, checked
from nestedjax.optim.types import Count, Finite, Leaf, NonNegative

Map: TypeAlias = Callable[[Leaf, Layout | None], Leaf]
NamedFeatures = Literal["identity", "sign", "normalized"]


class Features(NamedTuple):
    """A feature map, and how a momentum of features is read out.

    Attributes:
      lift: `(gradient, layout) -> features`.
      read: `(momentum of features, layout) -> update` in the gradient's shape; None: as it is.
    """

    lift: Map
    read: Map | None = None


def sign() -> Features:
    """`sign(g)`: without momentum, signSGD."""
    return Features(lambda g, layout: jnp.sign(g))


@checked
def normalized(eps: NonNegative = 1e-8) -> Features:
    """`g / (|g| + eps)`, elementwise: a sign that is soft near 0."""
    return Features(lambda g, layout: g / (jnp.abs(g) + eps))


@checked
def polynomial(coefficients: Sequence[Finite]) -> Features:
    """`sum_j a_j sign(g) |g|^j`, j = 1, 2, ..., elementwise and odd.

    Args:
      coefficients: a_1, a_2, ...
    """

    def lift(g: Leaf, layout: Layout | None) -> Leaf:
        # Horner's scheme on |g|, from the highest power down.
        total, size = jnp.zeros_like(g), jnp.abs(g)
        for a in reversed(coefficients):
            total = (total + a) * size
        return total * jnp.sign(g)

    return Features(lift)


@checked
def spectral(coefficients: Sequence[Finite]) -> Features:
    """`sum_j a_j g (g^T g)^j`, j = 0, 1, ...: an odd polynomial of the singular values.

    Args:
      coefficients: a_0, a_1, ...

    Raises (in `init`):
      ValueError: a leaf that is no matrix.
    """

    def lift(g: Leaf, layout: Layout | None) -> Leaf:
        if layout is None:
            raise ValueError(f"spectral features need matrices; a leaf of shape {g.shape} is none")
        power = fold(g, layout)
        total, gram = coefficients[0] * power, power.mT @ power
        for a in coefficients[1:]:
            power = power @ gram
            total = total + a * power
        return unfold(total, layout)

    return Features(lift)


@checked
def random_features(
    size: Count, *, function: Callable = jnp.tanh, seed: Annotated[int, Range(0, integer=True)] = 0
) -> Features:
    """`f(g A)` in R^{outputs x size} with a fixed random A, read out by its pseudo-inverse.

    The momentum has `size` columns. With the identity for f and size >= inputs the result is plain
    momentum.

    Args:
      size: features of each row of the gradient.
      function: f, elementwise.
      seed: seed of A, whose entries are drawn from normal(0, 1 / inputs).

    Raises (in `init`):
      ValueError: a leaf that is no matrix.
    """

    def projection(layout: Layout | None, dtype: DTypeLike) -> Float[Array, "inputs size"]:
        if layout is None:
            raise ValueError("random features need matrices: give axes for every parameter")
        inputs = layout.matrix[-1]
        return jax.random.normal(jax.random.key(seed), (inputs, size), dtype) * inputs**-0.5

    def lift(g: Leaf, layout: Layout | None) -> Leaf:
        return function(fold(g, layout) @ projection(layout, g.dtype))  # type: ignore[arg-type]

    def read(m: Leaf, layout: Layout | None) -> Leaf:
        return unfold(m @ jnp.linalg.pinv(projection(layout, m.dtype)), layout)  # type: ignore[arg-type]

    return Features(lift, read)


NAMED = {"sign": sign, "normalized": normalized}


def named_features(features: NamedFeatures | Features) -> Features | None:
    """The features that a name stands for; None for "identity".

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(features, Features):
        return features
    choice("features", features, ("identity", *NAMED))
    return NAMED[features]() if features in NAMED else None


def on_features(
    tx: optax.GradientTransformation, features: NamedFeatures | Features, axes: Axes
) -> optax.GradientTransformationExtraArgs:
    """`tx` with the features of the gradients as input, and its updates read out of features."""
    tx, maps = optax.with_extra_args_support(tx), named_features(features)
    if maps is None:
        return tx
    lift, read = maps

    def lifted(tree: Any) -> Any:
        return on_leaves(lambda layout, g: (lift(g, layout),), axes, tree)[0]

    def init(params: Any) -> Any:
        return tx.init(lifted(params))

    def update(updates, state, params=None, **extra):
        like = updates
        updates, state = tx.update(lifted(updates), state, params, **extra)
        if read is not None:
            updates = on_leaves(lambda layout, _, m: (read(m, layout),), axes, like, updates)[0]
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)
