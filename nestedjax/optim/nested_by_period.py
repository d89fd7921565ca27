"""Multi-frequency optimizers whose faster blocks start anew when a slower one steps."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestedjax.levels import due
from nestedjax.optim.by_period import PyTree, accumulate, by_period
from nestedjax.optim.memories import Memory, Part

RULES = ("fomaml", "reptile", "frozen")


class StartState(NamedTuple):
    """What a block holds of the next faster one.

    Attributes:
      start: the weights that the faster block starts from.
      written: the state of the optimizer that moves them, or ().
    """

    start: PyTree
    written: PyTree

    def memories(self) -> tuple[Memory | Part, ...]:
        """Its boxes: the start, which is a level of its own, and what its optimizer remembers."""
        about = "loss of its context", "written with its block"
        start = Memory("start of the faster block", self.start, *about, transfer="init")
        return start, Part(self.written)


class NestedState(NamedTuple):
    """The state of `nested_by_period`.

    Attributes:
      position: update calls since `init`.
      blocks: the state of `by_period`.
      starts: label of a block -> the `StartState` of the next faster one.
    """

    position: jax.Array  # shape=(), dtype=int32
    blocks: PyTree
    starts: dict[str, StartState]

    def memories(self) -> tuple[Part, ...]:
        """The boxes of its blocks and of their starts."""
        return Part(self.blocks), Part(self.starts)


def nested_by_period(
    groups: Mapping[str, tuple[int | None, optax.GradientTransformation]],
    labels: PyTree | Callable[[PyTree], PyTree],
    *,
    chain: Sequence[str],
    rule: str = "fomaml",
    reptile_rate: float = 0.1,
    reduction: str = "mean",
) -> optax.GradientTransformationExtraArgs:
    """`by_period` in which the start of each block is a parameter of the next slower one.

    When the slower block s steps, the start of the faster block f moves and f begins again from it,
    its optimizer's memory with it:

        start <- start + tx_s(reduce of f's gradients since s last stepped)       ("fomaml")
        start <- start + reptile_rate (f - start)                                 ("reptile")
        start <- start                                                            ("frozen")
        f <- start, bit for bit

    Args:
      groups: see `by_period`.
      labels: see `by_period`.
      chain: labels of the nested blocks, fast to slow; each period divides the next.
      rule: how a start moves.
      reptile_rate: of "reptile".
      reduction: "mean" or "sum" of a period's gradients.

    Returns:
      A transformation with state `NestedState`. Its `update` needs `params`. Learning-rate
      schedules (`optax.scale_by_schedule`) belong to the run: their count does not begin again.

    Raises:
      ValueError: if a period of the chain is missing or does not divide the next, or for what
        `by_period` raises.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nestedjax import optim
      >>> sgd = optax.sgd(1.0)
      >>> groups, labels = {"fast": (1, sgd), "slow": (3, sgd)}, {"a": "fast", "b": "slow"}
      >>> tx = optim.nested_by_period(groups, labels, chain=("fast", "slow"))
      >>> params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
      >>> state = tx.init(params)
      >>> for gradient in jnp.array([1.0, 2.0, 6.0]):
      ...     updates, state = tx.update({"a": gradient, "b": gradient}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["a"], params["b"])
      -1.0 0.0
      -3.0 0.0
      -3.0 -3.0

    Reference:
      Nested Learning (arXiv 2512.24695), equation 72; first order as in Finn et al. (arXiv
      1703.03400), Reptile as in Nichol et al. (arXiv 1803.02999).

    Departures from the paper: (1) the start of a block that is itself started anew is kept: only
    the weights begin again, not the starts they hold; (2) first order takes the gradients at the
    weights in force all through the slow period, the first-order gradient of its whole loss.
    """
    periods = _periods(groups, chain, rule)
    base = by_period(groups, labels, reduction=reduction)
    pairs = tuple(zip(chain, chain[1:], strict=False))
    movers = {slow: _mover(groups[slow], rule, reptile_rate, reduction) for _, slow in pairs}

    def init(params: PyTree) -> NestedState:
        names = labels(params) if callable(labels) else labels
        starts = {}
        for fast, slow in pairs:
            start = jax.tree.map(jnp.asarray, _pick(names, fast, params))
            starts[slow] = StartState(start, movers[slow].init(start))
        return NestedState(jnp.zeros((), jnp.int32), base.init(params), starts)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "nested_by_period needs the parameters: tx.update(grads, state, params)"
            )
        names = labels(params) if callable(labels) else labels
        new, blocks = base.update(updates, state.blocks, params, **extra)
        fresh, held = base.init(params).inner_states, dict(blocks.inner_states)
        starts = {}
        for fast, slow in pairs:
            now = due(state.position, periods[slow])
            weights, moved, gradient = (_pick(names, fast, t) for t in (params, new, updates))
            start, written = state.starts[slow]
            end = jax.tree.map(jnp.add, weights, moved)
            step, written = movers[slow].update(gradient, written, start, now=now, end=end)
            start = optax.apply_updates(start, step)
            jump = jax.tree.map(jnp.subtract, start, weights)
            # What the sum of weights and update will be, so that both agree to the last bit.
            reached = jax.tree.map(jnp.add, weights, jump)
            start, moved = _where(now, (reached, jump), (start, moved))
            starts[slow] = StartState(start, written)
            held[fast] = _begin_again(now, fresh[fast], held[fast])
            new = jax.tree.map(
                lambda name, old, part, fast=fast: part if name == fast else old, names, new, moved
            )
        blocks = blocks._replace(inner_states=held)
        return new, NestedState(state.position + 1, blocks, starts)

    return optax.GradientTransformationExtraArgs(init, update)


def _periods(groups, chain, rule) -> dict[str, int]:
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of {', '.join(RULES)}")
    periods = {label: groups[label][0] for label in chain if label in groups}
    for label in chain:
        if periods.get(label) is None:
            raise ValueError(f"chain={tuple(chain)}: {label!r} needs a period, got {periods}")
    for fast, slow in zip(chain, chain[1:], strict=False):
        if periods[slow] % periods[fast]:
            raise ValueError(
                f"chain={tuple(chain)}: the period {periods[fast]} of {fast!r} does not divide the"
                f" period {periods[slow]} of {slow!r}; list the fast blocks first"
            )
    return periods


def _mover(group, rule, reptile_rate, reduction):
    """What moves the start of a block: a transformation of the block's gradients."""
    period, tx = group
    if rule == "fomaml":
        return accumulate(tx, period, reduction=reduction)

    def update(updates, state, params=None, *, now, end, **extra):
        del updates, extra
        if rule == "frozen":
            return jax.tree.map(jnp.zeros_like, params), state
        step = jax.tree.map(lambda e, s: reptile_rate * (e - s), end, params)
        return _where(now, step, jax.tree.map(jnp.zeros_like, params)), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def _begin_again(now, fresh, held):
    """The fresh state of a block's optimizer where `now` holds, but for its schedules."""

    def choose(new, old):
        if isinstance(old, optax.ScaleByScheduleState):
            return old
        return jnp.where(now, new, old)

    def schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(choose, fresh, held, is_leaf=schedule)


def _pick(names, label, tree):
    """The leaves of one label; `optax.MaskedNode` in place of the others."""
    return jax.tree.map(
        lambda name, leaf: leaf if name == label else optax.MaskedNode(), names, tree
    )


def _where(condition, new, old):
    return jax.tree.map(partial(jnp.where, condition), new, old)
