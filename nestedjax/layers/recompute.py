"""What the backward pass recomputes."""

from collections.abc import Callable

import jax

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def save_products(function: Callable) -> Callable:
    """Recompute what is cheap in the backward pass: all but products with slow weights."""
    return jax.checkpoint(function, policy=POLICIES["dots"])
