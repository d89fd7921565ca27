"""Architectures: the function a memory's weights compute.

Weights are a tuple of matrices [out, in]. An architecture is written once, as a `body` that asks a
callback for every product `W_m z`. The callback decides what happens there: multiply by a matrix
(`apply`), record the input and take the derivative by the output (`linearise`), or run a chunk of
the delta rule in which the matrix changes from token to token (`nestedjax.memory.parallel`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Key

from nestedjax.errors import require_range
from pallas_kernels import check_width

Weights = tuple[Float[Array, "_ _"], ...]  # one [out, in] for every matrix
Features = tuple[Float[Array, "..."], ...]  # one [..., in] or [..., out] for every matrix
Multiply = Callable[[int, Float[Array, "*b n"]], Float[Array, "*b m"]]
Activation = Callable[[Float[Array, "*b f"]], Float[Array, "*b f"]]


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
    body: Callable[[Multiply, Float[Array, "*b n"]], Float[Array, "*b m"]]
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

    def init(self, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> Weights:
        """Random weights, normal with the standard deviations `scales`.

        Raises:
          ValueError: dtype is float64, and jax_enable_x64 is off.
        """
        check_width(f"{self.name} memory: dtype is", dtype)
        keys = jax.random.split(key, len(self.shapes))
        return tuple(
            scale * jax.random.normal(k, shape, dtype)
            for k, shape, scale in zip(keys, self.shapes, self.scales, strict=True)
        )

    def forward(self, multiply: Multiply, x: Float[Array, "*b n"]) -> Float[Array, "*b m"]:
        """The output [..., m] at x [..., n] with the products given by `multiply`."""
        y = self.body(multiply, x)
        return x + y if self.residual else y

    def apply(self, weights: Weights, x: Float[Array, "*b n"]) -> Float[Array, "*b m"]:
        """The output [..., m] at x [..., n]."""
        return self.forward(lambda m, z: z @ weights[m].T, x)

    def linearise(
        self, weights: Weights, x: Float[Array, "*b n"]
    ) -> tuple[Float[Array, "*b m"], Features, Callable[[Float[Array, "*b m"]], Features]]:
        """Output, layer inputs and the map from output errors to local errors.

        A tap of zeros is added to every product. The derivative by the tap of matrix m is the local
        error `E_m`, and the gradient of `W_m` is then the rank-one `E_m x_m^T` of each token: the
        form in which the chunked executions write it, without ever making a dense gradient.

        Args:
          weights: the matrices.
          x: [..., n].

        Returns:
          `(output[..., m], inputs, pull)`: `inputs[m]` is what matrix m is applied to, and
          `pull(dout)[m]` the derivative by `W_m inputs[m]`.
        """

        def tapped(taps: Features) -> tuple[Float[Array, "*b m"], Features]:
            inputs: dict[int, Array] = {}

            def multiply(m: int, z: Float[Array, "..."]) -> Float[Array, "..."]:
                inputs[m] = z
                return z @ weights[m].T + taps[m]

            y = self.forward(multiply, x)
            return y, tuple(inputs[m] for m in range(len(weights)))

        zeros = tuple(jnp.zeros((*x.shape[:-1], w.shape[0]), x.dtype) for w in weights)
        output, pull, inputs = jax.vjp(tapped, zeros, has_aux=True)
        return output, inputs, lambda dout: pull(dout)[0]

    def layer_inputs_and_errors(
        self, weights: Weights, x: Float[Array, "*b n"], dout: Float[Array, "*b m"]
    ) -> tuple[Features, Features]:
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
      scale: standard deviation of the initial matrix; 0 starts with an empty memory.

    Raises:
      ValueError: a width < 1, or a negative scale.
    """
    _check_widths("matrix", (key_dim, value_dim), scale)
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
      ValueError: fewer than two widths, a width < 1, or a negative scale.
    """
    if len(widths) < 2:
        raise ValueError(f"mlp memory: give at least the key and the value width, got {widths}")
    _check_widths("mlp", widths, output_scale)
    shapes = tuple((out, into) for into, out in zip(widths[:-1], widths[1:], strict=True))
    scales = tuple(into**-0.5 for into in widths[:-1])

    def body(multiply: Multiply, x: Float[Array, "*b n"]) -> Float[Array, "*b m"]:
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
      widths: as in `mlp`; the first equals the last.
      activation: between two matrices.
      output_scale: as in `mlp`. With 0 the memory starts as the identity, and its inner matrices
        get no gradient in the first chunk.

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
      output_scale: as in `residual_mlp`.

    Raises:
      ValueError: a width < 1, or a negative scale.

    Reference: ATLAS (arXiv 2505.23735).
    """
    _check_widths("gated_mlp", (dim, hidden), output_scale)

    def body(multiply: Multiply, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
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


def _check_widths(name: str, widths: Sequence[int], scale: float) -> None:
    for width in widths:
        require_range(f"{name} memory: width", width, 1, integer=True)
    require_range(f"{name} memory: scale", scale, 0)


def _check_residual(name: str, key_dim: int, value_dim: int) -> None:
    if key_dim != value_dim:
        raise ValueError(
            f"{name} memory: a residual needs equal key and value widths, got {key_dim} and "
            f"{value_dim}; use mlp"
        )
