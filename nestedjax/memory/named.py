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
| `oja_memory` | `M = a M' + eta (v k^T - v (M_0^T v)^T)` | eta, a |
| `omega_memory` | `M = a M' - sum_window eta_i grad_i` | eta, a |
| `titans` | `S = mu S' - eta grad; M = a M' + S` | eta, a, momentum mu |
| `moneta`, `yaad`, `memora` | MIRAS: lp and lq; Huber and decay; l2 and KL | eta, a |

`M'` is the running memory, `M_0` the one at the start of the chunk. A linear memory with the
dot objective does not depend on the chunk size at all. The others do: their chunk size is part of
the model.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax.levels import Level
from nestedjax.memory import objectives, retention, rules
from nestedjax.memory.architectures import Architecture, Weights, matrix
from nestedjax.memory.features import FeatureMap, identity
from nestedjax.memory.product import associative_memory
from nestedjax.memory.state import MemoryState, Tokens


def linear_attention(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    feature_map: FeatureMap = identity,
) -> Level:
    """Linear attention without normaliser: `M_t = M_{t-1} + v_t phi(k_t)^T` (learning rate 1).

    Args:
      key_dim: features of a key after the feature map.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: "running" attends to the present token, "running_prev" does not.
      feature_map: phi.

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
        name="linear_attention",
    )


def normalised_linear_attention(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    feature_map: FeatureMap,
    epsilon: float = 1e-6,
) -> Level:
    """Linear attention with normaliser: `y = M phi(q) / (z . phi(q) + epsilon)`, `z = z' + phi(k)`.

    The normaliser is one more row of the memory, whose value is always 1.

    Args:
      key_dim: features of a key after the feature map.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      feature_map: phi, with positive scores, e.g. `elu_plus_one`.
      epsilon: added to the normaliser.

    Returns:
      A level over `Tokens` with params `(M_0 [value_dim + 1, key_dim],)` and y [T, value_dim].
    """
    plain = linear_attention(key_dim, value_dim + 1, chunk_size=chunk_size, feature_map=feature_map)

    def step(
        params: Weights, state: MemoryState, x: Tokens
    ) -> tuple[MemoryState, Float[Array, "T dv"]]:
        ones = jnp.ones_like(x.values[:, :1])
        values = jnp.concatenate([x.values, ones], axis=-1)
        state, y = plain.step(params, state, x._replace(values=values))
        return state, y[:, :-1] / (y[:, -1:] + epsilon)

    return plain._replace(name="normalised_linear_attention", step=step)


def retention_decays(num_heads: int) -> Float[Array, " num_heads"]:
    """RetNet's decays of the heads, `1 - 2^(-5-h)`, float32 [num_heads]."""
    return 1.0 - 2.0 ** (-5.0 - jnp.arange(num_heads, dtype=jnp.float32))


def retention_memory(
    key_dim: int, value_dim: int, *, chunk_size: int, read: str = "running"
) -> Level:
    """RetNet's memory `M_t = a M_{t-1} + v_t k_t^T`: learning rate 1, decays `retention_decays`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: as in `associative_memory`.

    Returns:
      A level over `Tokens`.
    """
    return _linear("retention", key_dim, value_dim, rules.gradient(), chunk_size, read)


def delta_net(key_dim: int, value_dim: int, *, chunk_size: int, read: str = "running") -> Level:
    """DeltaNet `M_t = M_{t-1}(I - eta k k^T) + eta v k^T`; a learning rate of 2 reflects.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: as in `associative_memory`.

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
        name="delta_net",
    )


def gated_delta_net(
    key_dim: int, value_dim: int, *, chunk_size: int, read: str = "running"
) -> Level:
    """Gated DeltaNet `M_t = a M_{t-1}(I - eta k k^T) + eta v k^T`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: as in `associative_memory`.

    Returns:
      A level over `Tokens`.
    """
    return _linear("gated_delta_net", key_dim, value_dim, rules.coupled_delta(), chunk_size, read)


def hope_dot(key_dim: int, value_dim: int, *, chunk_size: int, read: str = "running_prev") -> Level:
    """HOPE's linear memory, dot objective: `M_t = M_{t-1}(a I - eta k k^T) + eta v k^T`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: as in `associative_memory`.

    Returns:
      A level over `Tokens`.

    Reference: Nested Learning (arXiv 2512.24695) eq. 92, with `+ v k^T` (printed minus).
    """
    return _linear("hope_dot", key_dim, value_dim, rules.delta(), chunk_size, read)


def hope_l2(key_dim: int, value_dim: int, *, chunk_size: int, read: str = "running_prev") -> Level:
    """HOPE's linear memory with the l2 objective.

    `M_t = M_{t-1}(a I - eta k k^T) - eta (M_0 k - v) k^T`, M_0 the memory at the chunk's start. The
    delta rule and the l2 gradient both erase, so that one repeated unit key converges to v/2 when
    nothing decays.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.

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
        name="hope_l2",
    )


def longhorn(key_dim: int, value_dim: int, *, chunk_size: int, read: str = "running") -> Level:
    """Longhorn: DeltaNet with the implicit learning rate `eta / (1 + eta |k|^2)`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: as in `associative_memory`.

    Returns:
      A level over `Tokens`.
    """
    return associative_memory(
        matrix(key_dim, value_dim),
        objectives.dot(),
        retention.none(),
        rules.closed_form_delta(),
        chunk_size=chunk_size,
        read=read,
        name="longhorn",
    )


def oja_memory(key_dim: int, value_dim: int, *, chunk_size: int, read: str = "running") -> Level:
    """Oja's rule `M_t = a M_{t-1} + eta (v k^T - v (M_0^T v)^T)`, M_0 as in `hope_l2`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.

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
        name="oja",
    )


def omega_memory(
    architecture: Architecture,
    *,
    window: int,
    chunk_size: int,
    read: str = "running",
    feature_map: FeatureMap = identity,
) -> Level:
    """OmegaNet: the l2 objective summed over the last `window` tokens, with decay.

    The paper's feature map is `polynomial(p)`.

    Args:
      architecture: e.g. `matrix` or `residual_mlp`.
      window: tokens.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.
      feature_map: of keys and queries.

    Returns:
      A level over `Tokens`, whose learning rates are the paper's gamma.

    Reference: ATLAS (arXiv 2505.23735).
    """
    return associative_memory(
        architecture,
        objectives.l2(),
        retention.decay(),
        rules.omega(window),
        chunk_size=chunk_size,
        read=read,
        feature_map=feature_map,
        name="omega",
    )


def titans(architecture: Architecture, *, chunk_size: int, read: str = "running") -> Level:
    """Titans' long-term memory: l2 objective, momentum and decay.

    The paper's alpha is `1 - decay`.

    Args:
      architecture: e.g. `mlp` or `residual_mlp`.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.

    Returns:
      A level over `Tokens`.

    Reference: Titans (arXiv 2501.00663); chunk form in spec C4.
    """
    return associative_memory(
        architecture,
        objectives.l2(),
        retention.decay(),
        rules.momentum(),
        chunk_size=chunk_size,
        read=read,
        name="titans",
    )


def moneta(architecture: Architecture, *, chunk_size: int, p: float = 3.0, q: float = 4.0) -> Level:
    """MIRAS-Moneta: smooth lp objective, lq retention, anchor reads.

    Args:
      architecture: its initial weights are the accumulator A_0 of `lq`.
      chunk_size: tokens; part of the model.
      p: of the objective.
      q: of the retention; the exact mirror map (`lq_printed` is the published text's).

    Returns:
      A level over `Tokens`.
    """
    return associative_memory(
        architecture,
        objectives.smooth_lp(p),
        retention.lq(q),
        rules.gradient(),
        chunk_size=chunk_size,
        read="anchor",
        name="moneta",
    )


def yaad(architecture: Architecture, *, chunk_size: int, read: str = "running") -> Level:
    """MIRAS-Yaad: the Huber objective with a threshold for each token, and decay.

    Args:
      architecture: e.g. `residual_mlp`.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.

    Returns:
      A level over `Tokens` (with `threshold`).
    """
    return associative_memory(
        architecture,
        objectives.huber(),
        retention.decay(),
        rules.gradient(),
        chunk_size=chunk_size,
        read=read,
        name="yaad",
    )


def memora(architecture: Architecture, *, chunk_size: int) -> Level:
    """MIRAS-Memora: l2 objective, KL retention on the simplex, anchor reads.

    Args:
      architecture: its initial weights are the free parameters of the softmax.
      chunk_size: tokens; part of the model.

    Returns:
      A level over `Tokens`.
    """
    return associative_memory(
        architecture,
        objectives.l2(),
        retention.kl(),
        rules.gradient(),
        chunk_size=chunk_size,
        read="anchor",
        name="memora",
    )


def _linear(
    name: str, key_dim: int, value_dim: int, rule: rules.Rule, chunk_size: int, read: str
) -> Level:
    """A linear memory with the dot objective and decay."""
    return associative_memory(
        matrix(key_dim, value_dim),
        objectives.dot(),
        retention.decay(),
        rule,
        chunk_size=chunk_size,
        read=read,
        name=name,
    )
