"""Deep momentum: the memory of past gradients is a network that is learned on line (spec B5)."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestedjax.optim.matrices import Axes, Layout, fold, on_leaves, rms, unfold, widened
from nestedjax.optim.memories import Memory
from nestedjax.optim.parts import PyTree, Rate, choice, number, rescaled, with_adamw

_EPS = 1e-8


class DeepMomentumState(NamedTuple):
    """The state of `scale_by_deep_momentum`.

    Attributes:
      network: the weights of one network a matrix; a plain momentum for what is no matrix.
      average: moving average of the negative keys; () but for `value="ema"`.
    """

    network: PyTree
    average: PyTree

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
      apply: `(weights, keys[outputs, inputs]) -> [outputs, inputs]`.
      shared: whether the rows share the weights, so that the inner loss is a mean over them.
    """

    start: Callable[..., PyTree]
    apply: Callable[[PyTree, jax.Array], jax.Array]
    shared: bool = True


def _mlp(key, outputs, inputs, width, dtype):
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


def deep_momentum(
    learning_rate: Rate,
    *,
    decay: Any = 0.9,
    inner_rate: Any = 0.5,
    architecture: str | Network = "mlp",
    width: int | None = None,
    objective: str = "l2",
    value: str = "neg_grad",
    value_decay: Any = 0.9,
    decay_to: str = "start",
    normalize_key: bool = True,
    rescale: bool = True,
    max_inputs: int = 4096,
    weight_decay: Any = 0.1,
    axes: Axes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A network m_phi over gradient rows as momentum for matrices, AdamW for everything else.

        phi <- phi_0 + decay (phi - phi_0) - step grad_phi L(m_phi(k), v)
        W   <- W + lr m_phi(k) / rms(m_phi(k)) - lr weight_decay W

    k = g / rms(g) row by row (a row holds one output's gradient), v the value it shall map to.

    Args:
      learning_rate: a rate or schedule that suits AdamW: updates have root mean square 1.
      decay: of the network towards its start.
      inner_rate: step = inner_rate / inputs with normalised keys and rows that share a network
        (|k|^2 is about `inputs`), else step = inner_rate.
      architecture: "mlp" (one hidden layer, no residual, output zero at the start), "linear",
        "keyless" (phi itself, whatever the key), or a `Network`.
      width: of the hidden layer; None: min(inputs, 64).
      objective: "l2" `1/2 |m(k) - v|^2` or "dot" `-<m(k), v>`, mean over rows that share a network.
      value: "neg_grad" v = -k, "ones" v = 1 (printed), "ema" a moving average of -k.
      value_decay: of that average.
      decay_to: "start", or "zero" as printed.
      normalize_key: False: k = g.
      rescale: False: the update is m_phi(k) as it comes out.
      max_inputs: refuse wider matrices, whose networks would cost too much.
      weight_decay: decoupled, of the matrices.
      axes: which parameters are matrices, and how; see `m3`.
      rest: what steps the others; see `m3`.

    Raises:
      ValueError: an argument out of range; a matrix that is too wide, or axes that do not fit, by
        the parameter's name.

    Example:
      >>> import jax.numpy as jnp
      >>> from nestedjax import optim
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optim.deep_momentum(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    Reference:
      Nested Learning (arXiv 2512.24695), equation 50.

    Departures from the paper, which leaves open what the network acts on:
      1. Tokens are the rows of the gradient, shared by one network a matrix.
      2. The value is -k, not 1: with 1 a linear network returns 1 (m.u), which is no momentum.
      3. The objective is l2, not the dot product, which has no minimum.
      4. Decay pulls to the start, not to zero: at zero an MLP has no gradient and stays there.
      5. Updates are rescaled, so that the step size is `learning_rate` alone.
    """
    rule = scale_by_deep_momentum(
        decay=decay,
        inner_rate=inner_rate,
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


def scale_by_deep_momentum(
    *,
    decay: Any = 0.9,
    inner_rate: Any = 0.5,
    architecture: str | Network = "mlp",
    width: int | None = None,
    objective: str = "l2",
    value: str = "neg_grad",
    value_decay: Any = 0.9,
    decay_to: str = "start",
    normalize_key: bool = True,
    rescale: bool = True,
    max_inputs: int = 4096,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """`-m_phi(k)` of `deep_momentum`, whose arguments these are: a direction to be subtracted.

    Leaves that are no matrices take plain momentum.
    """
    number("decay", decay)
    number("value_decay", value_decay)
    choice("objective", objective, ("l2", "dot"))
    choice("value", value, ("neg_grad", "ones", "ema"))
    choice("decay_to", decay_to, ("start", "zero"))
    if not isinstance(architecture, Network):
        architecture = NETWORKS[choice("architecture", architecture, tuple(NETWORKS))]
    inner = _Inner(architecture, width, objective, decay, inner_rate, decay_to, normalize_key)
    average = value == "ema"

    def begin(layout: Layout | None, p: jax.Array) -> tuple[PyTree]:
        if layout is None:
            return (jnp.zeros_like(p),)
        if layout.matrix[-1] > max_inputs:
            raise ValueError(
                f"{layout.name!r} has {layout.matrix[-1]} inputs, more than max_inputs={max_inputs}"
                ": raise it, or label the parameter None in axes"
            )
        start, stack = inner.start(layout, p.dtype), layout.matrix[:-2]
        return (jax.tree.map(lambda w: jnp.broadcast_to(w, (*stack, *w.shape)), start),)

    def init(params: PyTree) -> DeepMomentumState:
        (network,) = on_leaves(begin, axes, params)
        zeros = jax.tree.map(jnp.zeros_like, params) if average else ()
        return DeepMomentumState(network, zeros)

    def keyed(layout: Layout | None, g: jax.Array) -> tuple[jax.Array]:
        return (g / (rms(g, layout) + _EPS) if normalize_key and layout is not None else g,)

    def learn(layout: Layout | None, key: jax.Array, goal: jax.Array, phi: PyTree):
        if layout is None:
            phi = decay * phi + key
            return phi, phi
        arrays = fold(key, layout), fold(goal, layout)
        out, phi = inner.step(phi, inner.start(layout, key.dtype), *arrays)
        return unfold(-out, layout), phi

    def update(updates, state, params=None, **extra):
        (keys,) = on_leaves(keyed, axes, updates)
        goals, average_ = jax.tree.map(jnp.negative, keys), ()
        if value == "ones":
            goals = jax.tree.map(jnp.ones_like, keys)
        elif average:
            goals = average_ = jax.tree.map(
                lambda a, v: value_decay * a + (1 - value_decay) * v, state.average, goals
            )
        direction, network = on_leaves(learn, axes, keys, goals, state.network, outputs=2)
        direction = rescaled(direction, 1.0, axes) if rescale else direction
        return direction, DeepMomentumState(network, average_)

    return widened(optax.GradientTransformationExtraArgs(init, update))


class _Inner(NamedTuple):
    """The inner level: one gradient step of a network on the rows of one gradient."""

    network: Network
    width: int | None
    objective: str
    decay: Any
    rate: Any
    decay_to: str
    normalized: bool

    def start(self, layout: Layout, dtype: Any) -> PyTree:
        """phi_0, drawn from the parameter's name: the state need not hold it."""
        rows, columns = layout.matrix[-2:]
        width = min(columns, 64) if self.width is None else self.width
        key = jax.random.key(zlib.crc32(layout.name.encode()))
        return self.network.start(key, rows, columns, width, dtype)

    def step(self, phi: PyTree, start: PyTree, keys: jax.Array, goals: jax.Array):
        """The network's output after the step, and its weights; any stack of matrices in front."""
        shared = self.network.shared
        rate = self.rate / keys.shape[-1] if shared and self.normalized else self.rate

        def one(phi: PyTree, keys: jax.Array, goals: jax.Array) -> tuple[jax.Array, PyTree]:
            def loss(phi: PyTree) -> jax.Array:
                out = self.network.apply(phi, keys)
                each = (out - goals) ** 2 / 2 if self.objective == "l2" else -out * goals
                return jnp.sum(each) / (keys.shape[0] if shared else 1)

            def moved(w: jax.Array, slope: jax.Array, w0: jax.Array) -> jax.Array:
                anchor = w0 if self.decay_to == "start" else jnp.zeros_like(w0)
                return anchor + self.decay * (w - anchor) - rate * slope

            phi = jax.tree.map(moved, phi, jax.grad(loss)(phi), start)
            return self.network.apply(phi, keys), phi

        for _ in keys.shape[:-2]:
            one = jax.vmap(one)
        return one(phi, keys, goals)
