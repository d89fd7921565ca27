"""Deep momentum: the memory of past gradients is a network that is learned on line (spec B5)."""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from nestedjax.optim.matrices import Axes, Layout, fold, normalized, on_leaves, unfold, widened
from nestedjax.optim.memories import Memory
from nestedjax.optim.parts import choice, rescaled, with_adamw
from nestedjax.optim.ranges import checked
from nestedjax.optim.types import (
    Count,
    Decay,
    Fraction,
    Leaf,
    LearningRate,
    Leaves,
    Matrices,
    NonNegative,
    Number,
    PyTree,
)

Key: TypeAlias = PRNGKeyArray
Rows: TypeAlias = Float[Array, "outputs inputs"]


class DeepMomentumState(NamedTuple):
    """The state of `scale_by_deep_momentum`.

    Attributes:
      network: the weights of one network for each matrix; a momentum for what is no matrix.
      average: moving average of the negative keys; () but for `value="ema"`.
    """

    network: PyTree[Float[Array, "..."]]
    average: Leaves

    def memories(self) -> tuple[Memory, ...]:
        """Its boxes."""
        about = "from a gradient's rows to their value", "gradient step"
        return (
            Memory("gradient network", self.network, *about),
            Memory("average key", self.average, "l2 to the negative key", "moving average"),
        )


class Network(NamedTuple):
    """A network over the rows of one gradient matrix.

    Attributes:
      start: `(key, outputs, inputs, width, dtype) -> weights`.
      apply: `(weights, keys[outputs, inputs]) -> values[outputs, inputs]`.
      shared: whether the rows share the weights, so that the inner loss is a mean over rows.
    """

    start: Callable[[Key, int, int, int, Any], PyTree]
    apply: Callable[[PyTree, Rows], Rows]
    shared: bool = True


def _mlp(key: Key, outputs: int, inputs: int, width: int, dtype: DTypeLike) -> dict[str, Array]:
    # The second layer is zero, so that the network says nothing before it has learned something.
    first = jax.random.normal(key, (width, inputs), dtype) * inputs**-0.5
    return {"first": first, "second": jnp.zeros((inputs, width), dtype)}


NETWORKS = {
    "mlp": Network(_mlp, lambda w, x: jax.nn.gelu(x @ w["first"].mT) @ w["second"].mT),
    "linear": Network(
        lambda key, outputs, inputs, width, dtype: {"weight": jnp.zeros((inputs, inputs), dtype)},
        lambda w, x: x @ w["weight"].mT,
    ),
    "keyless": Network(
        lambda key, outputs, inputs, width, dtype: {"value": jnp.zeros((outputs, inputs), dtype)},
        lambda w, x: w["value"],
        shared=False,
    ),
}
Architecture: TypeAlias = Literal["mlp", "linear", "keyless"] | Network
InnerObjective = Literal["l2", "dot"]
Value = Literal["neg_grad", "ones", "ema"]
DecayTo = Literal["start", "zero"]


@checked
def deep_momentum(
    learning_rate: LearningRate,
    *,
    decay: Fraction = 0.9,
    inner_learning_rate: NonNegative = 0.5,
    architecture: Architecture = "mlp",
    width: Count | None = None,
    objective: InnerObjective = "l2",
    value: Value = "neg_grad",
    value_decay: Decay = 0.9,
    decay_to: DecayTo = "start",
    normalize_key: bool = True,
    rescale: bool = True,
    max_inputs: Count = 4096,
    weight_decay: NonNegative = 0.1,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A network m_phi over gradient rows as momentum for matrices, AdamW for everything else.

        phi <- phi_0 + decay (phi - phi_0) - zeta grad_phi L(m_phi(k), v)
        W   <- W + lr m_phi(k) / rms(m_phi(k)) - lr weight_decay W

    The rows of the gradient, one for each output neuron, are the tokens: a row of k = g / rms(g) is
    a key, and a row of v the value that the network shall map it to.

    Args:
      learning_rate: a number or a schedule; one that suits AdamW, since updates have root mean
        square 1.
      decay: factor on the network's distance from its start, in one step.
      inner_learning_rate: step size zeta of the network, divided by the number of inputs where keys
        are normalised and the rows share a network, since |k|^2 is about that number.
      architecture: the network: "mlp" (one hidden layer, no residual, output zero at the start),
        "linear", "keyless" (phi itself, whatever the key), or a `Network`.
      width: hidden units of the "mlp"; None: the smaller of inputs and 64.
      objective: inner loss: "l2" `1/2 |m(k) - v|^2` or "dot" `-<m(k), v>`, a mean over rows that
        share a network.
      value: what the network maps a key to: "neg_grad" v = -k, "ones" v = 1 (printed), or "ema", a
        moving average of -k.
      value_decay: decay of that moving average, in one step.
      decay_to: where the network decays to: its "start", or "zero" as printed.
      normalize_key: whether keys are divided by the matrix' root mean square; False: k = g.
      rescale: whether updates are rescaled to root mean square 1; False: the update is m_phi(k).
      max_inputs: refuse matrices with more inputs, whose networks would cost too much.
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      axes: which parameters are matrices, and how; see `m3`.
      rest: the optimizer of the parameters that are no matrices; see `m3`.

    Returns:
      A transformation. With `optax.inject_hyperparams` name `max_inputs`, `width` and functions in
      `static_args`.

    Raises:
      ValueError: an argument out of range; a matrix with too many inputs, or axes that do not fit,
        by the parameter's name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.deep_momentum(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Nested Learning (arXiv 2512.24695), equation 50; spec B5.

    Departures from the paper, which leaves open what the network acts on:
      1. The tokens are the rows of the gradient, and one network for each matrix is shared by them.
      2. The value is -k, not 1 (`value`): with 1 a linear network returns 1 (m.u), which is no
         momentum.
      3. The objective is l2 (`objective`): the dot product has no minimum.
      4. The network decays to its start (`decay_to`): an MLP at zero has no gradient and stays
         there.
      5. Updates are rescaled (`rescale`), so that `learning_rate` alone is the step size.
    """
    rule = scale_by_deep_momentum(
        decay=decay,
        inner_learning_rate=inner_learning_rate,
        architecture=architecture,
        width=width,
        objective=objective,
        value=value,
        value_decay=value_decay,
        decay_to=decay_to,
        normalize_key=normalize_key,
        rescale=rescale,
        max_inputs=max_inputs,
        axes=axes,
    )
    return with_adamw(rule, learning_rate, axes=axes, weight_decay=weight_decay, rest=rest)


@checked
def scale_by_deep_momentum(
    *,
    decay: Fraction = 0.9,
    inner_learning_rate: NonNegative = 0.5,
    architecture: Architecture = "mlp",
    width: Count | None = None,
    objective: InnerObjective = "l2",
    value: Value = "neg_grad",
    value_decay: Decay = 0.9,
    decay_to: DecayTo = "start",
    normalize_key: bool = True,
    rescale: bool = True,
    max_inputs: Count = 4096,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`-m_phi(k)` of `deep_momentum`, whose arguments these are: a direction to be subtracted.

    Leaves that are no matrices take plain momentum.
    """
    choice("objective", objective, get_args(InnerObjective))
    choice("value", value, get_args(Value))
    choice("decay_to", decay_to, get_args(DecayTo))
    if not isinstance(architecture, Network):
        architecture = NETWORKS[choice("architecture", architecture, tuple(NETWORKS))]
    inner = _Inner(
        architecture, width, objective, decay, inner_learning_rate, decay_to, normalize_key
    )
    begin, average = partial(inner.begin, max_inputs=max_inputs), value == "ema"

    def init(params: Leaves) -> DeepMomentumState:
        (network,) = on_leaves(begin, axes, params)
        zeros = jax.tree.map(jnp.zeros_like, params) if average else ()
        return DeepMomentumState(network, zeros)

    def keyed(layout: Layout | None, g: Leaf) -> tuple[Leaf]:
        return (normalized(g, layout) if normalize_key and layout is not None else g,)

    def update(updates, state, params=None, **extra):
        (keys,) = on_leaves(keyed, axes, updates)
        goals, average_ = jax.tree.map(jnp.negative, keys), ()
        if value == "ones":
            goals = jax.tree.map(jnp.ones_like, keys)
        elif average:
            goals = average_ = jax.tree.map(
                lambda a, v: value_decay * a + (1 - value_decay) * v, state.average, goals
            )
        direction, network = on_leaves(inner.learn, axes, keys, goals, state.network, outputs=2)
        direction = rescaled(direction, 1.0, axes) if rescale else direction
        return direction, DeepMomentumState(network, average_)

    return widened(optax.GradientTransformationExtraArgs(init, update))


class _Inner(NamedTuple):
    """The inner level: one gradient step of a network on the rows of one gradient."""

    network: Network
    width: int | None
    objective: InnerObjective
    decay: Number
    learning_rate: Number
    decay_to: DecayTo
    normalized: bool

    def begin(self, layout: Layout | None, p: Leaf, *, max_inputs: int) -> tuple[PyTree]:
        """The state of a leaf: one network for each of its matrices, or zeros for a momentum."""
        if layout is None:
            return (jnp.zeros_like(p),)
        if layout.matrix[-1] > max_inputs:
            raise ValueError(
                f"{layout.name!r} has {layout.matrix[-1]} inputs, more than max_inputs={max_inputs}"
                ": raise it, or label the parameter None in axes"
            )
        start, stack = self.start(layout, p.dtype), layout.matrix[:-2]
        return (jax.tree.map(lambda w: jnp.broadcast_to(w, (*stack, *w.shape)), start),)

    def learn(
        self, layout: Layout | None, key: Leaf, goal: Leaf, phi: PyTree
    ) -> tuple[Leaf, PyTree]:
        """The direction of a leaf, and its state after one step."""
        if layout is None:
            phi = self.decay * phi + key
            return phi, phi
        arrays = fold(key, layout), fold(goal, layout)
        out, phi = self.step(phi, self.start(layout, key.dtype), *arrays)
        return unfold(-out, layout), phi

    def start(self, layout: Layout, dtype: DTypeLike) -> PyTree:
        """phi_0, drawn from the parameter's name: the state need not hold it."""
        rows, columns = layout.matrix[-2:]
        width = min(columns, 64) if self.width is None else self.width
        key = jax.random.key(zlib.crc32(layout.name.encode()))
        return self.network.start(key, rows, columns, width, dtype)

    def step(
        self, phi: PyTree, start: PyTree, keys: Matrices, goals: Matrices
    ) -> tuple[Matrices, PyTree]:
        """The network's output after the step, and its weights; any stack of matrices in front."""
        shared = self.network.shared
        # The curvature of the l2 loss in a linear network is the keys' mean of k k^T, whose trace
        # is |k|^2 = inputs: a step of 1 / inputs is stable for keys of any direction.
        divisor = keys.shape[-1] if shared and self.normalized else 1
        learning_rate = self.learning_rate / divisor

        def one(phi: PyTree, keys: Rows, goals: Rows) -> tuple[Rows, PyTree]:
            def loss(phi: PyTree) -> Float[Array, ""]:
                out = self.network.apply(phi, keys)
                each = (out - goals) ** 2 / 2 if self.objective == "l2" else -out * goals
                return jnp.sum(each) / (keys.shape[0] if shared else 1)

            def moved(w: Leaf, slope: Leaf, w0: Leaf) -> Leaf:
                anchor = w0 if self.decay_to == "start" else jnp.zeros_like(w0)
                return anchor + self.decay * (w - anchor) - learning_rate * slope

            phi = jax.tree.map(moved, phi, jax.grad(loss)(phi), start)
            return self.network.apply(phi, keys), phi

        for _ in keys.shape[:-2]:
            one = jax.vmap(one)
        return one(phi, keys, goals)
