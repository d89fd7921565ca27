"""Optimizers at several frequencies whose faster blocks begin again when a slower one steps."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from nestedjax.levels import due
from nestedjax.optim.by_period import Labels, Reduction, accumulate, by_period
from nestedjax.optim.dgd import DGDState
from nestedjax.optim.ggd import GGDState
from nestedjax.optim.memories import Memory, Part
from nestedjax.optim.parts import choice
from nestedjax.optim.ranges import checked
from nestedjax.optim.types import Counter, Fraction, Leaves, Number, PyTree

Rule = Literal["fomaml", "reptile", "frozen"]


class StartState(NamedTuple):
    """What a block holds of the next faster one.

    Attributes:
      start: the weights that the faster block begins from.
      written: the state of the optimizer that moves them; () for "reptile" and "frozen".
    """

    start: Leaves
    written: PyTree

    def memories(self) -> tuple[Memory | Part, ...]:
        """Its boxes: the start, which is a level of its own, and what its optimizer remembers."""
        about = "loss of its context", "written with its block"
        start = Memory("start of the faster block", self.start, *about, transfer="init")
        return start, Part(self.written)


class NestedState(NamedTuple):
    """The state of `nested_by_period`.

    Attributes:
      count: update calls since `init`.
      blocks: the state of `by_period`.
      starts: label of a block -> the `StartState` of the next faster one.
    """

    count: Counter  # type: ignore[assignment]  # hides tuple.count, as in optax
    blocks: optax.PartitionState
    starts: dict[str, StartState]

    def memories(self) -> tuple[Part, ...]:
        """The boxes of its blocks and of their starts."""
        return Part(self.blocks), Part(self.starts)


@checked
def nested_by_period(
    groups: Mapping[str, tuple[int | None, optax.GradientTransformation]],
    labels: Labels,
    *,
    chain: Sequence[str],
    rule: Rule = "fomaml",
    reptile_learning_rate: Fraction = 0.1,
    reduction: Reduction = "mean",
) -> optax.GradientTransformationExtraArgs:
    """`by_period` in which the start of each block is a parameter of the next slower one.

    When the slower block s steps, the start of the faster block f moves and f begins again from it,
    its optimizer's memory with it:

        start <- start + tx_s(reduce of f's gradients since s last stepped)       ("fomaml")
        start <- start + reptile_learning_rate (f - start)                        ("reptile")
        start <- start                                                            ("frozen")
        f <- start, bit for bit

    Args:
      groups: see `by_period`.
      labels: see `by_period`.
      chain: labels of the nested blocks, fast to slow; each period divides the next.
      rule: how a start moves: "fomaml", "reptile" or "frozen".
      reptile_learning_rate: the fraction of the way from the start to the weights, for "reptile".
      reduction: "mean" or "sum" of a period's gradients; see `accumulate`.

    Returns:
      A transformation with state `NestedState`, whose `update` needs `params`. When a block begins
      again so does its optimizer, but for the counters of schedules (of a learning rate, of weight
      decay, of injected hyper-parameters), which belong to the run.

    Raises:
      ValueError: a period of the chain that is missing or does not divide the next, or what
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
      Nested Learning (arXiv 2512.24695), equation 72; "fomaml" is the first-order gradient of Finn
      et al. (arXiv 1703.03400), "reptile" that of Nichol et al. (arXiv 1803.02999); spec D5.

    Departures from the paper:
      1. A block that begins again keeps the start it holds for the next faster one: only its
         weights begin again.
      2. The first-order gradient is summed over the whole slow period, each term at the weights
         that were in force: the gradient of the period's whole loss with the start's influence on
         the weights taken as the identity.
    """
    base = by_period(groups, labels, reduction=reduction)
    periods = _periods(groups, chain, rule)
    pairs = tuple(zip(chain, chain[1:], strict=False))
    movers = {
        slow: _mover(groups[slow], rule, reptile_learning_rate, reduction) for _, slow in pairs
    }

    def init(params: Leaves) -> NestedState:
        names = labels(params) if callable(labels) else labels
        starts = {}
        for fast, slow in pairs:
            # a copy: the parameters' own arrays could not be donated beside the state
            start = jax.tree.map(jnp.array, _pick(names, fast, params))
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
            now = due(state.count, periods[slow])
            parts = (_pick(names, fast, tree) for tree in (params, new, updates))
            moved, starts[slow] = _moved(movers[slow], state.starts[slow], now, *parts)
            held[fast] = _begin_again(now, fresh[fast], held[fast])
            new = jax.tree.map(
                lambda name, old, part, fast=fast: part if name == fast else old, names, new, moved
            )
        blocks = blocks._replace(inner_states=held)
        return new, NestedState(state.count + 1, blocks, starts)

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(
    mover: optax.GradientTransformationExtraArgs,
    state: StartState,
    now: bool | Bool[Array, ""],
    weights: Leaves,
    moved: Leaves,
    gradient: Leaves,
) -> tuple[Leaves, StartState]:
    """A fast block's update and its start after a step of the block that holds the start.

    Args:
      mover: see `_mover`.
      state: the start before.
      now: whether the slower block steps, so that the fast one begins again.
      weights: of the fast block.
      moved: its own update.
      gradient: its gradient.
    """
    start, written = state
    end = jax.tree.map(jnp.add, weights, moved)  # where the block arrived in this period
    step, written = mover.update(gradient, written, start, now=now, end=end)
    start = optax.apply_updates(start, step)
    jump = jax.tree.map(jnp.subtract, start, weights)
    # weights + (start - weights) is not start to the last bit: keep as start what the block will
    # have been moved to, so that "begins again from it" is exact.
    reached = jax.tree.map(jnp.add, weights, jump)
    start, moved = _where(now, (reached, jump), (start, moved))
    return moved, StartState(start, written)


def _periods(groups: Mapping[str, Any], chain: Sequence[str], rule: Rule) -> dict[str, int]:
    choice("rule", rule, get_args(Rule))
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


def _mover(
    group: tuple[int | None, optax.GradientTransformation],
    rule: Rule,
    learning_rate: Number,
    reduction: Reduction,
) -> optax.GradientTransformationExtraArgs:
    """What moves the start of a block: a transformation of the block's gradients.

    Its `update` takes whether the slower block steps, `now`, and the weights after this step,
    `end`, as extra arguments.
    """
    period, tx = group
    if rule == "fomaml":
        return accumulate(tx, period, reduction=reduction)

    def update(updates, state, params=None, *, now, end, **extra):
        del updates, extra
        if rule == "frozen":
            return jax.tree.map(jnp.zeros_like, params), state
        step = jax.tree.map(lambda e, s: learning_rate * (e - s), end, params)
        return _where(now, step, jax.tree.map(jnp.zeros_like, params)), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


# The states with schedules inside of them, and the fields by which those know where they are. Other
# counters, such as that of Adam's bias correction, count what the state has seen of its context.
_SCHEDULED = (
    optax.ScaleByScheduleState,
    optax.InjectStatefulHyperparamsState,
    DGDState,
    GGDState,
)
_KEPT = ("count", "hyperparams", "hyperparams_states")


def _scheduled(node: Any) -> bool:
    # the state of optax.add_decayed_weights with a schedule has no public name
    return isinstance(node, _SCHEDULED) or type(node).__name__ == "WeightDecaySchedule"


def _begin_again(now: bool | Bool[Array, ""], fresh: PyTree, held: PyTree) -> PyTree:
    """The fresh state of a block's optimizer where `now` holds, but for its schedules."""

    def choose(new: Any, old: Any) -> Any:
        if not _scheduled(old):
            return jnp.where(now, new, old)
        return type(old)(
            **{
                name: value if name in _KEPT else _begin_again(now, getattr(new, name), value)
                for name, value in old._asdict().items()
            }
        )

    return jax.tree.map(choose, fresh, held, is_leaf=_scheduled)


def _pick(names: PyTree, label: str, tree: PyTree) -> PyTree:
    """The leaves of one label; `optax.MaskedNode` in place of the others."""
    return jax.tree.map(
        lambda name, leaf: leaf if name == label else optax.MaskedNode(), names, tree
    )


def _where(condition: bool | Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(partial(jnp.where, condition), new, old)
