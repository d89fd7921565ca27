"""Named points of the product: the published memories (spec C2, C4).

Each is `associative_memory` with its menu entries and nothing else, so each takes the same `Tokens`
and can be copied as a recipe. Where a paper has a rate of 1 the tokens say so.

| function | recurrence (column convention) | tokens |
|---|---|---|
| `linear_attention` | `M = M' + v k^T` | rate 1 |
| `retention_memory` (RetNet) | `M = g M' + v k^T` | rate 1, keep `retention_decays` |
| `delta_net` | `M = M'(I - b k k^T) + b v k^T` | rate b |
| `gated_delta_net` | `M = a M'(I - b k k^T) + b v k^T` | rate b, keep a |
| `hope_dot` | `M = M'(a I - b k k^T) + b v k^T` | rate b, keep a |
| `hope_l2` | `M = M'(a I - b k k^T) - b (M_a k - v) k^T` | rate b, keep a |
| `longhorn` | `delta_net` with `b = b0/(1 + b0 |k|^2)` | rate b0 |
| `oja_memory` | `M = a M' + b (v k^T - v (M_a^T v)^T)` | rate b, keep a |
| `omega_memory` | `M = a M' - sum_window rate_i grad_i` | rate, keep |
| `titans` | `S = mu S' - eta grad; M = keep M' + S` | rate eta, keep, momentum |
| `moneta`, `yaad`, `memora` | MIRAS: lp and lq; Huber and decay; l2 and KL | rate, keep |

`M'` is the running memory, `M_a` the one at the start of the chunk. Linear memories with the dot
objective do not depend on the chunk size at all; the others do, and it belongs to the model.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from nestedjax.levels import Level
from nestedjax.memory import objectives, retention, rules
from nestedjax.memory.architectures import Architecture, matrix
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
    """Linear attention without normaliser: `M_t = M_{t-1} + v_t phi(k_t)^T` (rate 1).

    Args:
      key_dim: features of a key after the feature map.
      value_dim: features of a value.
      chunk_size: tokens; it changes only the speed.
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
      chunk_size: tokens; it changes only the speed.
      feature_map: phi, with positive scores, e.g. `elu_plus_one`.
      epsilon: added to the normaliser.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens` with params `(M_0 [value_dim + 1, key_dim],)` and y [T, value_dim].
    """
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

    return plain._replace(
        step=after(plain.step, 1), whole=after(plain.whole, 1), advance=after(plain.advance, 0)
    )


def retention_decays(num_heads: int) -> Array:
    """RetNet's decays of the heads, `1 - 2^(-5-h)`, float32 [num_heads]."""
    return 1.0 - 2.0 ** (-5.0 - jnp.arange(num_heads, dtype=jnp.float32))


def retention_memory(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """RetNet's memory `M_t = keep M_{t-1} + v_t k_t^T` (rate 1, keep `retention_decays`).

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes only the speed.
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
    """DeltaNet `M_t = M_{t-1}(I - rate k k^T) + rate v k^T`; a rate of 2 reflects.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes only the speed.
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
    """Gated DeltaNet `M_t = keep M_{t-1}(I - rate k k^T) + rate v k^T`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes only the speed.
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
    """HOPE's linear memory, dot objective: `M_t = M_{t-1}(keep I - rate k k^T) + rate v k^T`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes only the speed.
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

    `M_t = M_{t-1}(keep I - rate k k^T) - rate (M_a k - v) k^T`: erased twice, so one repeated unit
    key converges to v/2 with keep 1.

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


def longhorn(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """Longhorn: DeltaNet with the implicit rate `rate / (1 + rate |k|^2)`.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes only the speed.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

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
        implementation=implementation,
        name="longhorn",
    )


def oja_memory(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """Oja's rule `M_t = keep M_{t-1} + rate (v k^T - v (M_a^T v)^T)`.

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


def omega_memory(
    architecture: Architecture,
    *,
    window: int,
    chunk_size: int,
    read: str = "running",
    feature_map: FeatureMap = identity,
    implementation: str = "xla",
) -> Level:
    """OmegaNet: l2 on the last `window` tokens with decay (`feature_map=polynomial(p)` there).

    Args:
      architecture: e.g. `matrix` or `residual_mlp`.
      window: tokens.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.
      feature_map: of keys and queries.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens`, whose rates are the paper's gamma.

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
        implementation=implementation,
        name="omega",
    )


def titans(
    architecture: Architecture,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """Titans' long-term memory: l2, momentum and decay (`keep = 1 - alpha` there).

    Args:
      architecture: e.g. `mlp` or `residual_mlp`.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

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
        implementation=implementation,
        name="titans",
    )


def moneta(
    architecture: Architecture,
    *,
    chunk_size: int,
    p: float = 3.0,
    q: float = 4.0,
    implementation: str = "xla",
) -> Level:
    """MIRAS-Moneta: smooth lp objective, lq retention, anchor reads.

    Args:
      architecture: its initial weights are the accumulator A_0 of `lq`.
      chunk_size: tokens; part of the model.
      p: of the objective.
      q: of the retention; the exact mirror map (`lq_printed` is the published text's).
      implementation: as in `associative_memory`.

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
        implementation=implementation,
        name="moneta",
    )


def yaad(
    architecture: Architecture,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """MIRAS-Yaad: Huber objective with a threshold a token, decay.

    Args:
      architecture: e.g. `residual_mlp`.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

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
        implementation=implementation,
        name="yaad",
    )


def memora(
    architecture: Architecture,
    *,
    chunk_size: int,
    implementation: str = "xla",
) -> Level:
    """MIRAS-Memora: l2 objective, KL retention on the simplex, anchor reads.

    Args:
      architecture: its initial weights are the free parameters of the softmax.
      chunk_size: tokens; part of the model.
      implementation: as in `associative_memory`.

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
        implementation=implementation,
        name="memora",
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
