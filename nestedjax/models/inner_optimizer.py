"""The optimizer that a continuum memory uses inside one context."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nestedjax.layers import CMSConfig, InnerConfig
from nestedjax.optim import by_period, nested_by_period

PyTree = Any


def inner_optimizer(
    cms: CMSConfig, chunks: Mapping[str, int | None], rates: Float[Array, "blocks layers"]
) -> optax.GradientTransformationExtraArgs:
    """A transformation of `{label: fast weights of one block, [layers, ...]}`.

    `fast_l <- fast_l - learning_rate exp(rates_l) rule(clip(reduce gradients of the period))`.

    Args:
      cms: the inner optimizer and the form.
      chunks: label -> mini-chunks between two writes of that block, fast first.
      rates: logarithm of a factor on the learning rate, per block and layer.
    """
    inner = cms.inner
    groups = {
        label: (every, _rule(inner, inner.learning_rate * jnp.exp(rates[index])))
        for index, (label, every) in enumerate(chunks.items())
    }

    def labels(fast: PyTree) -> PyTree:
        return {label: jax.tree.map(lambda _, name=label: name, of) for label, of in fast.items()}

    if cms.form == "nested":
        return nested_by_period(
            groups, labels, chain=tuple(groups), rule=cms.start, reduction=inner.reduction
        )
    return by_period(groups, labels, reduction=inner.reduction)


def switched_writes(
    tx: optax.GradientTransformationExtraArgs, switches: Mapping[str, str]
) -> optax.GradientTransformationExtraArgs:
    """The transformation of `{label: fast weights}` with some blocks switched.

    Args:
      tx: what writes the blocks; its state stays what it is.
      switches: label -> "not_written" (no gradient; weight decay and momentum act), "frozen" or
        "reset" (no update: what a block is written at a period's end is all that a reset undoes).
    """

    def quiet(tree: PyTree, labels: Any) -> PyTree:
        return {
            n: jax.tree.map(jnp.zeros_like, of) if n in labels else of for n, of in tree.items()
        }

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> Any:
        updates, state = tx.update(quiet(updates, switches), state, params, **extra)
        still = [name for name, switch in switches.items() if switch != "not_written"]
        return quiet(updates, still), state

    return optax.GradientTransformationExtraArgs(tx.init, update) if switches else tx


def _rule(inner: InnerConfig, rate: Float[Array, " layers"]) -> optax.GradientTransformation:
    steps = [] if inner.clip is None else [_clip(inner.clip)]
    if inner.optimizer == "momentum":
        steps.append(optax.trace(inner.momentum))
    if inner.optimizer == "adamw":
        # eps_root: the square root of a zero moment has no derivative, and the outer gradient is
        # taken through it.
        steps.append(optax.scale_by_adam(inner.momentum, 0.95, eps_root=1e-16))
        steps.append(optax.add_decayed_weights(inner.weight_decay))

    def descend(updates, params):
        del params
        return jax.tree.map(
            lambda u: -u * rate.astype(u.dtype).reshape(-1, *[1] * (u.ndim - 1)), updates
        )

    return optax.chain(*steps, optax.stateless(descend))


def _clip(largest: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with a derivative where the gradient is zero."""

    def clip(updates, params):
        del params
        squared = sum(jnp.sum(jnp.square(u)) for u in jax.tree.leaves(updates))
        scale = jnp.minimum(1.0, largest * jax.lax.rsqrt(squared + 1e-12))
        return jax.tree.map(lambda u: u * scale, updates)

    return optax.stateless(clip)
