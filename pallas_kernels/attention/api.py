"""The public face of attention: validates, picks an implementation."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from pallas_kernels._checks import check_floats
from pallas_kernels._linalg.derivatives import reverse_only
from pallas_kernels.attention import cudnn, pallas_tpu
from pallas_kernels.attention.cudnn import attention_cudnn
from pallas_kernels.attention.masks import Masks
from pallas_kernels.attention.pallas_tpu import attention_pallas_tpu
from pallas_kernels.attention.reference import attention_reference
from pallas_kernels.attention.xla import attention_xla

_IMPLEMENTATIONS = {
    "reference": attention_reference,
    "xla": attention_xla,
    "cudnn": attention_cudnn,
    "pallas_tpu": attention_pallas_tpu,
}
Documents = Int[Array, "..."] | tuple[Int[Array, "..."], Int[Array, "..."]]


def attention(
    queries: Float[Array, "..."],
    keys: Float[Array, "..."],
    values: Float[Array, "..."],
    *,
    causal: bool = True,
    window: int | None = None,
    prefix: int | Int[Array, "..."] | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """Softmax attention of T tokens to the S tokens that end with them.

    `y_t = sum_s a_ts v_s`, `a_ts = exp(scale q_t . k_s) / sum_s exp(scale q_t . k_s)` over the keys
    that t sees. With positions counted along the keys (query t stands at `t + S - T`) it sees s if
    `s <= t` (causal) and `t - window < s` (window), or `s < prefix`; and, in any case, only where
    both belong to one document. A query that sees no key gives zeros, and gives no gradient.

    Args:
      queries: [B, T, H, K].
      keys: [B, S, G, K], S >= T; G divides H, and each key head serves H / G query heads in a row.
      values: as the keys.
      causal: no token sees a later one.
      window: tokens that each token sees, itself included; without `causal` as many after it.
      prefix: number of leading keys that every token sees, whatever the window, and that see each
        other both ways; an int, or an integer array [B], which "pallas_tpu" does not take.
      documents: number of each token's document, integers [B, T]; a pair of [B, T] and [B, S]
        where they differ (needed if S > T).
      scale: of the scores; None: 1 / sqrt(K).
      implementation: "reference" (the formula, in at least float32), "xla"
        (`jax.nn.dot_product_attention`), "cudnn" (its cuDNN form, on CUDA devices), "pallas_tpu"
        (JAX's splash attention; on a mesh only inside `jax.shard_map`) or None, see
        `default_implementation`.

    Returns:
      [B, T, H, K] in the dtype of the queries.

    Raises:
      ValueError: a shape, dtype, mask or implementation that does not fit, with its value.
      NotImplementedError: a workload or a device that the implementation asked for does not take;
        "pallas_gpu", which does not exist: cuDNN is the GPU's kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> same = jnp.zeros((1, 3, 1, 1))
      >>> values = jnp.array([0.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
      >>> attention(same, same, values).ravel().tolist()
      [0.0, 1.0, 2.0]
      >>> attention(same, same, values, window=2).ravel().tolist()
      [0.0, 1.0, 3.0]

    References:
      Attention Is All You Need (arXiv 1706.03762) eq. 1; FlashAttention-2 (arXiv 2307.08691) for
      the kernels; grouped heads: arXiv 2305.13245.
    """
    masks = _checked(queries, keys, values, causal, window, prefix, documents)
    if implementation is None:
        implementation = _default(queries, keys, masks)
    if implementation == "pallas_gpu":
        raise NotImplementedError(
            "attention has no implementation='pallas_gpu': use 'cudnn', the GPU's kernel"
        )
    if implementation not in _IMPLEMENTATIONS:
        known = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r} is not one of {known}")
    if implementation == "cudnn" and _platform() != "cuda":
        raise NotImplementedError(f"implementation='cudnn' needs a CUDA device, not {_platform()}")
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    given = (queries, keys, values)
    if implementation in ("cudnn", "pallas_tpu"):
        given = reverse_only(given, f"attention(implementation={implementation!r})")
    return _IMPLEMENTATIONS[implementation](*given, masks, scale)


def default_implementation(
    queries: Float[Array, "..."],
    keys: Float[Array, "..."],
    values: Float[Array, "..."],
    *,
    causal: bool = True,
    window: int | None = None,
    prefix: int | Int[Array, "..."] | None = None,
    documents: Documents | None = None,
) -> str:
    """What `attention` runs on this process's first device with `implementation=None`.

    "reference" on a CPU, where it is the fastest, and for float64. Else "cudnn" on a CUDA device
    and "pallas_tpu" on a TPU where they take the workload, which they do not on a mesh with
    Explicit axes ("cudnn"), or on one outside of `jax.shard_map` or with fewer than 128 queries
    ("pallas_tpu"); where they do not, "xla" after a warning that says why (without one for few
    queries). "xla" on any other device. The arguments are those of `attention`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 8, 2, 4))
      >>> default_implementation(x, x, x)  # on a CPU
      'reference'
    """
    return _default(
        queries, keys, _checked(queries, keys, values, causal, window, prefix, documents)
    )


def _default(queries, keys, masks: Masks) -> str:
    mesh, platform = jax.sharding.get_abstract_mesh(), _platform()
    if platform == "cpu" or queries.dtype == jnp.float64:
        return "reference"
    if platform == "cuda":
        kernel, reason = "cudnn", cudnn.refusal(queries, keys, masks)
        if AxisType.Explicit in mesh.axis_types:
            reason = reason or "cuDNN's attention does not take a mesh with Explicit axes"
    elif platform == "tpu":
        kernel, reason = "pallas_tpu", pallas_tpu.refusal(queries, masks)
        if mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types):
            reason = reason or "splash attention takes a mesh only inside jax.shard_map"
        if queries.shape[1] < pallas_tpu.LANES:
            return "xla"  # nothing is lost: the kernel would fill up a block
    else:
        return "xla"
    if reason is None:
        return kernel
    warnings.warn(f"attention runs in XLA: {reason}", stacklevel=3)
    return "xla"


def _platform() -> str:
    device = jax.devices()[0]
    if device.platform == "gpu":
        return "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"
    return device.platform


def _checked(queries, keys, values, causal, window, prefix, documents) -> Masks:
    """Check everything; leave out the masks that mask nothing."""
    check_floats("attention", queries=queries, keys=keys, values=values)
    if queries.ndim != 4 or keys.ndim != 4:
        raise ValueError(
            f"attention needs queries [B, T, H, K] and keys [B, S, G, K], got {queries.shape} and "
            f"{keys.shape}"
        )
    batch, length, heads, width = queries.shape
    total, groups = keys.shape[1:3]
    if (keys.shape[0], keys.shape[3]) != (batch, width) or not groups or heads % groups:
        raise ValueError(
            f"keys have shape {keys.shape}, expected [{batch}, S, G, {width}] with G a divisor of "
            f"{heads} for queries {queries.shape}"
        )
    if values.shape != keys.shape:
        raise ValueError(f"values have shape {values.shape}, expected the keys' {keys.shape}")
    if not queries.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"queries, keys and values have dtypes {queries.dtype}, {keys.dtype}, {values.dtype}; "
            "cast them to one"
        )
    if total < length:
        raise ValueError(f"{total} keys for {length} queries: keys end with the queries, S >= T")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window={window!r} must be a static number of tokens >= 1, or None")
    prefix = _checked_prefix(prefix, batch, total)
    pair = _checked_documents(documents, batch, length, total)
    window = None if window is not None and window >= total else window
    if isinstance(prefix, int) and prefix == total:
        causal, window, prefix = False, None, None
    if not causal and window is None:
        prefix = None
    return Masks(causal, window, prefix, pair, blanks=isinstance(documents, tuple))


def _checked_prefix(prefix, batch, total):
    if prefix is None or (isinstance(prefix, int) and prefix == 0):
        return None
    if isinstance(prefix, int):
        if prefix < 0:
            raise ValueError(f"prefix={prefix} must be a number of tokens >= 0")
        return min(prefix, total)
    if not isinstance(prefix, jax.Array | np.ndarray):
        raise ValueError(f"prefix={prefix!r} must be an int, or an integer array [{batch}]")
    if prefix.shape != (batch,) or not jnp.issubdtype(prefix.dtype, jnp.integer):
        raise ValueError(
            f"prefix is {prefix.dtype}{list(prefix.shape)}, expected an int or integers [{batch}]"
        )
    return prefix.astype(jnp.int32)


def _checked_documents(documents, batch, length, total):
    if documents is None:
        return None
    pair = documents if isinstance(documents, tuple) else (documents, documents)
    if len(pair) != 2 or not all(isinstance(a, jax.Array | np.ndarray) for a in pair):
        raise ValueError(
            f"documents is a {type(documents).__name__}, expected integers [{batch}, {length}] or "
            "a pair of them: make them with jnp.asarray"
        )
    for name, numbers, count in zip(("queries", "keys"), pair, (length, total), strict=True):
        if numbers.shape != (batch, count) or not jnp.issubdtype(numbers.dtype, jnp.integer):
            raise ValueError(
                f"documents of the {name} are {numbers.dtype}{list(numbers.shape)}, expected "
                f"integers [{batch}, {count}]; give a pair where keys are longer than queries"
            )
    return tuple(numbers.astype(jnp.int32) for numbers in pair)
