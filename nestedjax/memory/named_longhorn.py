"""Longhorn, as its theorem states it and as it is published; see `named` for the table."""

from nestedjax.levels import Level
from nestedjax.memory import objectives, retention, rules
from nestedjax.memory.architectures import matrix
from nestedjax.memory.product import associative_memory


def longhorn(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """Longhorn by its theorem: DeltaNet with the implicit learning rate `eta / (1 + eta |k|^2)`.

    `M_t = M_{t-1}(I - eta' k k^T) + eta' v k^T`, the exact minimiser of
    `|M - M_{t-1}|^2 + eta |M k - v|^2`. The published architecture and its code keep only the
    diagonal of `k k^T`: see `longhorn_diagonal`.

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
        rules.closed_form_delta(),
        chunk_size=chunk_size,
        read=read,
        implementation=implementation,
        name="longhorn",
    )


def longhorn_diagonal(
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """Longhorn as it is published: `M_mn = M'_mn (1 - eta' k_n^2) + eta' v_m k_n`.

    `eta' = eta / (1 + eta |k|^2)` as in `longhorn`, whose `k k^T` is replaced by its diagonal, so
    that the recurrence is elementwise.

    Args:
      key_dim: features of a key.
      value_dim: features of a value.
      chunk_size: tokens; it changes the speed, not the result.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens`.

    Reference: Longhorn (arXiv 2407.14207), section 3.3 and `Longhorn.step` of its code. Departure:
    there every channel m has an eta of its own; here one for all channels of a head.
    """
    return associative_memory(
        matrix(key_dim, value_dim),
        objectives.dot(),
        retention.none(),
        rules.diagonal_closed_form_delta(),
        chunk_size=chunk_size,
        read=read,
        implementation=implementation,
        name="longhorn_diagonal",
    )
