"""Which key a query sees: one definition for every implementation.

Query t of T stands at position `t + S - T` of S keys: keys end with the queries.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Masks(NamedTuple):
    """Validated masks; what masks nothing is None or False.

    Attributes:
      causal: no key after the query.
      window: tokens that a query sees, itself included; without `causal` as many after it.
      prefix: leading keys that are seen from everywhere in the document; one for each sequence
        where it is an array.
      documents: of queries and of keys; other documents' keys are not seen.
      blanks: whether some query may see no key at all.
    """

    causal: bool = True
    window: int | None = None
    prefix: int | Int[Array, " B"] | None = None
    documents: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None
    blanks: bool = False


def in_reach(position: Any, key: Any, causal: bool, window: int | None, prefix: Any) -> Any:
    """Whether a query sees a key of its document, by their positions; None: every key.

    Operators alone, so that it runs on numpy and jax arrays and inside a kernel.
    """
    parts = []
    if causal:
        parts.append(key <= position)
    if window is not None:
        parts.append(key > position - window)
        if not causal:
            parts.append(key < position + window)
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    return seen if prefix is None else seen | (key < prefix)


def visible(masks: Masks, length: int, total: int) -> Bool[Array, "b 1 T S"] | None:
    """The mask of `length` queries and `total` keys, a batch of one where it is shared.

    None where every query sees every key.
    """
    key = jnp.arange(total, dtype=jnp.int32)[None, None, None]
    position = key[..., total - length :].mT
    prefix = masks.prefix
    if prefix is not None and not isinstance(prefix, int):
        prefix = prefix[:, None, None, None]
    seen = in_reach(position, key, masks.causal, masks.window, prefix)
    if masks.documents is not None:
        of_queries, of_keys = masks.documents
        same = of_queries[:, None, :, None] == of_keys[:, None, None, :]
        seen = same if seen is None else seen & same
    return seen


def without_blanks(outputs: Array, masks: Masks, total: int) -> Array:
    """Zeros where a query sees no key: a softmax would give it the mean of all values."""
    if not masks.blanks:
        return outputs
    seen = visible(masks, outputs.shape[1], total)
    assert seen is not None
    some = jnp.any(seen, axis=-1)[:, 0, :, None, None]
    return jnp.where(some, outputs, jnp.zeros((), outputs.dtype))
