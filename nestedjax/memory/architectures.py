"""Architectures: the function a memory's weights compute.

Weights are a tuple of matrices [out, in]. An architecture is written once, as a `body` that asks
for every product `W_m z` through a callback; applying it, reading it with weights that change from
token to token, and its local errors are all the same body with another callback.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Weights = tuple[Array, ...]
Multiply = Callable[[int, Array], Array]
Activation = Callable[[Array], Array]


class Architecture(NamedTuple):
    """A function of weights, without biases.

    Attributes:
      name: what tables and errors call it.
      shapes: [out, in] of every weight matrix, in the order the body uses them.
      scales: standard deviation of every weight matrix at initialisation.
      body: `body(multiply, x[..., n]) -> [..., m]`, where `multiply(m, z)` is `W_m z`; every
        matrix is asked for exactly once.
      residual: whether the output is `x + body(x)`.
      inputs: the matrices whose layer input is the key itself.
      activation: between two matrices; None without any.
    """

    name: str
    shapes: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    body: Callable[[Multiply, Array], Array]
    residual: bool = False
    inputs: tuple[int, ...] = (0,)
    activation: Activation | None = None

    @property
    def key_dim(self) -> int:
        """Features of a key."""
        return self.shapes[0][1]

    @property
    def value_dim(self) -> int:
        """Features of an output."""
        return self.shapes[-1][0]

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Weights:
        """Random weights, normal with the standard deviations `scales`."""
        keys = jax.random.split(key, len(self.shapes))
        return tuple(
            scale * jax.random.normal(k, shape, dtype)
            for k, shape, scale in zip(keys, self.shapes, self.scales, strict=True)
        )

    def forward(self, multiply: Multiply, x: Array) -> Array:
        """The output [..., m] at x [..., n] with the products given by `multiply`."""
        y = self.body(multiply, x)
        return x + y if self.residual else y

    def apply(self, weights: Weights, x: Array) -> Array:
        """The output [..., m] at x [..., n]."""
        return self.forward(lambda m, z: z @ weights[m].T, x)

    def linearise(
        self, weights: Weights, x: Array
    ) -> tuple[Array, Weights, Callable[[Array], Weights]]:
        """Output, layer inputs and the map from output errors to local errors.

        Args:
          weights: the matrices.
          x: [..., n].

        Returns:
          `(output[..., m], inputs, pull)`: `inputs[m]` is what matrix m is applied to, and
          `pull(dout)[m]` the derivative by `W_m inputs[m]`.
        """

        def tapped(taps: Weights) -> tuple[Array, Weights]:
            inputs: dict[int, Array] = {}

            def multiply(m: int, z: Array) -> Array:
                inputs[m] = z
                return z @ weights[m].T + taps[m]

            y = self.forward(multiply, x)
            return y, tuple(inputs[m] for m in range(len(weights)))

        zeros = tuple(jnp.zeros((*x.shape[:-1], w.shape[0]), x.dtype) for w in weights)
        output, pull, inputs = jax.vjp(tapped, zeros, has_aux=True)
        return output, inputs, lambda dout: pull(dout)[0]

    def layer_inputs_and_errors(
        self, weights: Weights, x: Array, dout: Array
    ) -> tuple[Weights, Weights]:
        """Layer inputs `x_m` and local errors `E_m`: the gradient of token t is `E_m,t x_m,t^T`.

        Args:
          weights: the matrices.
          x: [..., n].
          dout: [..., m], derivative of the loss by the output.

        Returns:
          `(inputs, errors)`, tuples over the matrices.
        """
        _, inputs, pull = self.linearise(weights, x)
        return inputs, pull(dout)


def matrix(key_dim: int, value_dim: int, *, scale: float = 0.0) -> Architecture:
    """Linear memory `M(z) = W z`, W [value_dim, key_dim].

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      scale: standard deviation of the initial matrix; 0 starts empty.
    """
    return Architecture(
        "matrix", ((value_dim, key_dim),), (scale,), lambda multiply, x: multiply(0, x)
    )


def mlp(
    widths: Sequence[int],
    *,
    activation: Activation = jax.nn.gelu,
    output_scale: float = 1.0,
) -> Architecture:
    """`M(z) = W_n s(... s(W_1 z))` of any depth, without residual.

    Args:
      widths: features from the key to the value, `(key_dim, hidden, ..., value_dim)`.
      activation: between two matrices.
      output_scale: factor on the last matrix's standard deviation; the standard deviation of the
        others is `in ** -0.5`.

    Raises:
      ValueError: fewer than two widths.
    """
    if len(widths) < 2:
        raise ValueError(f"mlp memory: give at least the key and the value width, got {widths}")
    shapes = tuple((out, into) for into, out in zip(widths[:-1], widths[1:], strict=True))
    scales = tuple(into**-0.5 for into in widths[:-1])

    def body(multiply: Multiply, x: Array) -> Array:
        x = multiply(0, x)
        for m in range(1, len(shapes)):
            x = multiply(m, activation(x))
        return x

    return Architecture(
        "mlp", shapes, (*scales[:-1], scales[-1] * output_scale), body, activation=activation
    )


def residual_mlp(
    widths: Sequence[int],
    *,
    activation: Activation = jax.nn.gelu,
    output_scale: float = 0.1,
) -> Architecture:
    """`M(z) = z + W_n s(... s(W_1 z))`; with one hidden layer, HOPE's memory [P 89].

    Args:
      widths: as `mlp`, the first equal to the last.
      activation: between two matrices.
      output_scale: as `mlp`; 0 starts as the identity (then the inner matrices get no gradient
        from the first chunk).

    Raises:
      ValueError: fewer than two widths, or key and value widths differ.
    """
    plain = mlp(widths, activation=activation, output_scale=output_scale)
    _check_residual("residual_mlp", plain.key_dim, plain.value_dim)
    return plain._replace(name="residual_mlp", residual=True)


def gated_mlp(
    dim: int,
    hidden: int,
    *,
    activation: Activation = jax.nn.gelu,
    output_scale: float = 0.1,
) -> Architecture:
    """Atlas++: `M(z) = z + W_1 (s(W_2 z) * W_3 z)`; the weights are ordered `(W_2, W_3, W_1)`.

    Args:
      dim: features of keys and values.
      hidden: features of the gated layer.
      activation: s.
      output_scale: as `residual_mlp`.
    Reference: ATLAS (arXiv 2505.23735).
    """

    def body(multiply: Multiply, x: Array) -> Array:
        return multiply(2, activation(multiply(0, x)) * multiply(1, x))

    return Architecture(
        "gated_mlp",
        ((hidden, dim), (hidden, dim), (dim, hidden)),
        (dim**-0.5, dim**-0.5, output_scale * hidden**-0.5),
        body,
        residual=True,
        inputs=(0, 1),
        activation=activation,
    )


def _check_residual(name: str, key_dim: int, value_dim: int) -> None:
    if key_dim != value_dim:
        raise ValueError(
            f"{name} memory: a residual needs equal key and value widths, got {key_dim} and "
            f"{value_dim}; use mlp"
        )
