"""Two recurrent rivals that the library lacks: LSTM and the self-referential weight matrix.

Each is a layer in a block like every other, with the same norm, residual and SwiGLU network.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from nestedjax import layers, models
from nestedjax.fields import Count, Heads
from nestedjax.layers import gates


def recurrence(step, state, x):
    """`step(state, x_t) -> (state, y_t)` over the tokens of x [B, T, ...]."""
    state, y = jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1), state


def one_document(name: str, resets) -> None:
    """Refuse rows of several documents, which no task here has."""
    if resets is not None:
        raise NotImplementedError(f"{name} takes one document a row: leave out resets")


def drawn(shape: tuple[int, ...], fan: int, rngs: nnx.Rngs) -> nnx.Param:
    """A weight of normal(0, 1 / fan)."""
    value = jax.random.normal(rngs.params(), shape) * fan**-0.5
    return layers.param(value, (None,) * len(shape), matrix=None, weight_decay=True)


class LSTM(layers.Layer):
    """`c <- f c + i g`, `h <- o tanh(c)`; gates and g of x and the last h (Hochreiter 1997).

    The forget gate starts at bias 1.
    """

    name = "lstm"

    def __init__(self, config: models.ModelConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.inputs = drawn((width, 4 * width), width, rngs)
        self.hidden = drawn((width, 4 * width), width, rngs)
        bias = jnp.zeros((4, width)).at[1].set(1.0).reshape(-1)
        self.bias = layers.param(bias, (None,), matrix=None, weight_decay=False)
        self.width = width

    def init_state(self, batch: int):
        """Cell and output of `batch` sequences at their start."""
        return jnp.zeros((batch, self.width)), jnp.zeros((batch, self.width))

    def __call__(self, x, state=None, *, resets=None):
        """The outputs h of T more tokens; the state is (c, h)."""
        one_document("LSTM", resets)

        def step(state, x):
            c, h = state
            i, f, o, g = jnp.split(x + h @ self.hidden[...], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        fed = x @ self.inputs[...] + self.bias[...][None, None]
        return recurrence(step, self.init_state(x.shape[0]) if state is None else state, fed)


class SelfReferential(layers.Layer):
    """A matrix that writes itself (SRWM; Irie et al., arXiv 2202.05780, eq. 5-8).

        y, k, q, b = W s(x);  W <- W + sigmoid(b) (W s(q) - W s(k)) s(k)^T,  s the softmax

    One W a head; b are four rates, of the rows of y, k, q and b. Departure: the reads y go through
    one output projection, as the reads of every memory of this library do.
    """

    name = "srwm"

    def __init__(self, config: models.ModelConfig, heads: int, *, rngs: nnx.Rngs):
        self.heads, self.wide = heads, layers.head_dim(config.width, heads)
        self.start = drawn((heads, 3 * self.wide + 4, self.wide), self.wide, rngs)
        self.out = drawn((config.width, config.width), 2 * config.layers * config.width, rngs)

    def init_state(self, batch: int):
        """The matrices of `batch` sequences at their start."""
        return jnp.broadcast_to(self.start[...][None], (batch, *self.start.shape))

    def __call__(self, x, state=None, *, resets=None):
        """The projected reads of T more tokens; the state is W."""
        one_document("SelfReferential", resets)
        rows = (self.wide, self.wide, self.wide, 4)

        def times(w, z):
            return jnp.einsum("bhrd,bhd->bhr", w, jax.nn.softmax(z))

        def step(w, x):
            y, k, q, b = jnp.split(times(w, x), (self.wide, 2 * self.wide, 3 * self.wide), -1)
            rates = [
                jnp.broadcast_to(jax.nn.sigmoid(b[..., i : i + 1]), (*b.shape[:-1], size))
                for i, size in enumerate(rows)
            ]
            change = jnp.concatenate(rates, -1) * (times(w, q) - times(w, k))
            return w + change[..., :, None] * jax.nn.softmax(k)[..., None, :], y

        cut = x.reshape(*x.shape[:2], self.heads, self.wide)
        y, state = recurrence(step, self.init_state(x.shape[0]) if state is None else state, cut)
        return y.reshape(x.shape) @ self.out[...], state


@dataclasses.dataclass(frozen=True)
class LSTMConfig(models.ModelConfig):
    """LSTM blocks.

    Attributes:
      hidden: width of the SwiGLU network.
    """

    hidden: Count

    def block(self, *, rngs: nnx.Rngs) -> models.Block:
        """The LSTM, then a SwiGLU network."""
        return models.Block(
            self, LSTM(self, rngs=rngs), layers.FeedForward(self, self.hidden, rngs=rngs)
        )


@dataclasses.dataclass(frozen=True)
class SelfReferentialConfig(models.ModelConfig):
    """Blocks of self-referential weight matrices.

    Attributes:
      hidden: width of the SwiGLU network.
      heads: matrices.
    """

    hidden: Count
    heads: Heads = 4

    def block(self, *, rngs: nnx.Rngs) -> models.Block:
        """The matrices, then a SwiGLU network."""
        mixer = SelfReferential(self, self.heads, rngs=rngs)
        return models.Block(self, mixer, layers.FeedForward(self, self.hidden, rngs=rngs))


@dataclasses.dataclass(frozen=True)
class ReflectingDeltaNetConfig(models.DeltaNetConfig):
    """DeltaNet with learning rates to 2: its transitions have eigenvalues down to -1."""

    def mixer(self, wide: int, *, rngs: nnx.Rngs) -> layers.MemoryMixer:
        """DeltaNet's, with another maximum of the learning rate."""
        mixer = models.DeltaNetConfig.mixer(self, wide, rngs=rngs)
        shape = gates.Heads(self.heads, wide, wide)
        mixer.gates["learning_rate"] = gates.sigmoid(maximum=2.0)(self, shape, rngs=rngs)
        return mixer
