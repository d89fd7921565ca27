"""Named points of the product: the published memories (spec C2, C4).

Each is `associative_memory` with its menu entries and nothing else, so each takes the same `Tokens`
and can be copied as a recipe. In the table eta is the learning rate and a the decay of a token;
where a paper has no learning rate, the tokens bring one of 1.

| function | recurrence (column convention) | tokens |
|---|---|---|
| `linear_attention` | `M = M' + v k^T` | eta = 1 |
| `retention_memory` (RetNet) | `M = g M' + v k^T` | eta = 1, decay `retention_decays` |
| `delta_net` | `M = M'(I - eta k k^T) + eta v k^T` | eta |
| `gated_delta_net` | `M = a M'(I - eta k k^T) + eta v k^T` | eta, a |
| `hope_dot` | `M = M'(a I - eta k k^T) + eta v k^T` | eta, a |
| `hope_l2` | `M = M'(a I - eta k k^T) - eta (M_0 k - v) k^T` | eta, a |
| `longhorn` | `delta_net` with `eta / (1 + eta |k|^2)` | eta |
| `longhorn_diagonal` | the same with `diag(k^2)` in place of `k k^T` | eta |
| `ttt` | `M = M_0 - 1/j sum_{since the chunk's start} eta_i grad_i` | eta, rate_offset |
| `oja_memory` | `M = a M' + eta (v k^T - v (M_0^T v)^T)` | eta, a |
| `omega_memory` | `M = a M' - sum_window eta_i grad_i` | eta, a |
| `titans` | `S = mu S' - eta grad; M = a M' + S` | eta, a, momentum mu |
| `moneta`, `yaad`, `memora` | MIRAS: lp and lq; Huber and decay; l2 and KL | eta, a |

`M'` is the running memory, `M_0` the one at the start of the chunk. A linear memory with the
dot objective does not depend on the chunk size at all. The others do: their chunk size is part of
the model.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax.errors import require_range
from nestedjax.levels import Level
from nestedjax.memory import objectives, retention, rules
from nestedjax.memory.architectures import matrix
from nestedjax.memory.features import FeatureMap, identity
from nestedjax.memory.product import associative_memory


def linear_attention(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    feature_map: FeatureMap = identity,
    implementation: str = "xla",
) -> Level:
    """Linear attention without normaliser: `M_t = M_{t-1} + v_t phi(k_t)^T` (learning rate 1).

    Args:
      key_dim: features of a key after the feature map.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: "running" attends to the present token, "running_prev" does not.
      feature_map: phi.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens`.
    """
    return associative_memory(
        matrix(key_dim, value_dim),
        objectives.dot(),
        retention.none(),
        rules.gradient(),
        chunk_size=chunk_size,
        read=read,
        feature_map=feature_map,
        implementation=implementation,
        name="linear_attention",
    )


def normalised_linear_attention(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    feature_map: FeatureMap,
    epsilon: float = 1e-6,
    implementation: str = "xla",
) -> Level:
    """Linear attention with normaliser: `y = M phi(q) / (z . phi(q) + epsilon)`, `z = z' + phi(k)`.

    The normaliser is one more row of the memory, whose value is always 1.

    Args:
      key_dim: features of a key after the feature map.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      feature_map: phi, with positive scores, e.g. `elu_plus_one`.
      epsilon: added to the normaliser.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens` with params `(M_0 [value_dim + 1, key_dim],)` and y [T, value_dim].

    Raises:
      ValueError: epsilon < 0.
    """
    require_range("normalised_linear_attention: epsilon", epsilon, 0)
    plain = associative_memory(
        matrix(key_dim, value_dim + 1),
        objectives.dot(),
        retention.none(),
        rules.gradient(),
        chunk_size=chunk_size,
        read="running",
        feature_map=feature_map,
        value_map=lambda v: jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1),
        implementation=implementation,
        name="normalised_linear_attention",
    )

    return _normalised(plain, epsilon)


def _normalised(plain: Level, epsilon: float) -> Level:
    """The level with its reads divided by their last feature."""

    def normalised(y: Array) -> Array:
        return y[..., :-1] / (y[..., -1:] + epsilon)

    def after(function: Any, place: int) -> Any:
        """`function` with the one of its two results that holds the reads normalised."""
        if function is None:
            return None

        def both(*given: Any, **options: Any) -> tuple[Any, Any]:
            found = list(function(*given, **options))
            found[place] = normalised(found[place])
            return tuple(found)

        return both

    switched = plain.switched
    assert switched is not None
    return plain._replace(
        step=after(plain.step, 1),
        whole=after(plain.whole, 1),
        advance=after(plain.advance, 0),
        switched=lambda how: _normalised(switched(how), epsilon),
    )


def retention_decays(num_heads: int) -> Float[Array, " num_heads"]:
    """RetNet's decays of the heads, `1 - 2^(-5-h)`, float32 [num_heads].

    Raises:
      ValueError: num_heads < 1.
    """
    require_range("retention_decays: num_heads", num_heads, 1, integer=True)
    return 1.0 - 2.0 ** (-5.0 - jnp.arange(num_heads, dtype=jnp.float32))


def retention_memory(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """RetNet's memory `M_t = a M_{t-1} + v_t k_t^T`: learning rate 1, decays `retention_decays`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens`.
    """
    return _linear(
        "retention", key_dim, value_dim, rules.gradient(), chunk_size, read, implementation
    )


def delta_net(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """DeltaNet `M_t = M_{t-1}(I - eta k k^T) + eta v k^T`; a learning rate of 2 reflects.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens`.
    """
    return associative_memory(
        matrix(key_dim, value_dim),
        objectives.dot(),
        retention.none(),
        rules.explicit_delta(),
        chunk_size=chunk_size,
        read=read,
        implementation=implementation,
        name="delta_net",
    )


def gated_delta_net(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """Gated DeltaNet `M_t = a M_{t-1}(I - eta k k^T) + eta v k^T`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens`.
    """
    return _linear(
        "gated_delta_net",
        key_dim,
        value_dim,
        rules.coupled_delta(),
        chunk_size,
        read,
        implementation,
    )


def hope_dot(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running_prev",
    implementation: str = "xla",
) -> Level:
    """HOPE's linear memory, dot objective: `M_t = M_{t-1}(a I - eta k k^T) + eta v k^T`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens`.

    Reference: Nested Learning (arXiv 2512.24695) eq. 92, with `+ v k^T` (printed minus).
    """
    return _linear("hope_dot", key_dim, value_dim, rules.delta(), chunk_size, read, implementation)


def hope_l2(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running_prev",
    implementation: str = "xla",
) -> Level:
    """HOPE's linear memory with the l2 objective.

    `M_t = M_{t-1}(a I - eta k k^T) - eta (M_0 k - v) k^T`, M_0 the memory at the chunk's start. The
    delta rule and the l2 gradient both erase, so that one repeated unit key converges to v/2 when
    nothing decays.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens`.

    Reference: Nested Learning (arXiv 2512.24695) eq. 93, with the half objective.
    """
    return associative_memory(
        matrix(key_dim, value_dim),
        objectives.l2(),
        retention.decay(),
        rules.delta(),
        chunk_size=chunk_size,
        read=read,
        implementation=implementation,
        name="hope_l2",
    )


def oja_memory(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """Oja's rule `M_t = a M_{t-1} + eta (v k^T - v (M_0^T v)^T)`, M_0 as in `hope_l2`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens`.
    """
    return associative_memory(
        matrix(key_dim, value_dim),
        objectives.oja(),
        retention.decay(),
        rules.gradient(),
        chunk_size=chunk_size,
        read=read,
        implementation=implementation,
        name="oja",
    )


def _linear(
    name: str,
    key_dim: int,
    value_dim: int,
    rule: rules.Rule,
    chunk_size: int,
    read: str,
    implementation: str,
) -> Level:
    """A linear memory with the dot objective and decay."""
    return associative_memory(
        matrix(key_dim, value_dim),
        objectives.dot(),
        retention.decay(),
        rule,
        chunk_size=chunk_size,
        read=read,
        implementation=implementation,
        name=name,
    )
