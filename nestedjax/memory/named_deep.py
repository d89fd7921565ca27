"""Named points of the product whose weights may be any architecture; see `named` for the table."""

from nestedjax.levels import Level
from nestedjax.memory import objectives, retention, rules
from nestedjax.memory.architectures import Architecture
from nestedjax.memory.features import FeatureMap, identity
from nestedjax.memory.product import associative_memory


def omega_memory(
    architecture: Architecture,
    *,
    window: int,
    chunk_size: int,
    read: str = "running",
    feature_map: FeatureMap = identity,
    implementation: str = "xla",
) -> Level:
    """OmegaNet: the l2 objective summed over the last `window` tokens, with decay.

    The paper's feature map is `polynomial(p)`.

    Args:
      architecture: e.g. `matrix` or `residual_mlp`.
      window: tokens.
      chunk_size: tokens; part of the model.
      read: as in `associative_memory`.
      feature_map: of keys and queries.
      implementation: as in `associative_memory`.

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
    """Titans' long-term memory: l2 objective, momentum and decay.

    The paper's alpha is `1 - decay`.

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


def ttt(
    architecture: Architecture,
    *,
    chunk_size: int,
    read: str = "running",
    implementation: str = "xla",
) -> Level:
    """The memory of TTT: l2 objective, mini-batches whose gradients are averaged (`mean_gradient`).

    TTT-Linear has `matrix`, TTT-MLP `mlp`; the paper's mini-batch has 16 tokens.

    Args:
      architecture: e.g. `matrix` or `mlp`.
      chunk_size: tokens of a mini-batch; part of the model.
      read: as in `associative_memory`.
      implementation: as in `associative_memory`.

    Returns:
      A level over `Tokens` (with `rate_offset` where it is learned).

    Reference: TTT (arXiv 2407.04620). Departures: the paper's inner model has a bias and a layer
    norm with a residual, `M(k) = k + LN(W k + b)`; here it is the architecture.
    """
    return associative_memory(
        architecture,
        objectives.l2(),
        retention.none(),
        rules.mean_gradient(),
        chunk_size=chunk_size,
        read=read,
        implementation=implementation,
        name="ttt",
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
    """MIRAS-Yaad: the Huber objective with a threshold for each token, and decay.

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
