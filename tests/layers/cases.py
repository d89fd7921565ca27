"""Self-modifying memories with inputs that make every term of the rule matter."""

import jax
import jax.numpy as jnp
import numpy as np

from nestedjax import levels
from nestedjax.layers.self_modifying_config import SelfModifyingConfig, init_params
from nestedjax.memory import Tokens

LENGTH = 16


def draw(config: SelfModifyingConfig, length=LENGTH, seed=0, scale=1.0):
    """Parameters and `length` tokens in float64; momentum where the memory has it."""
    params = init_params(jax.random.key(seed), config)
    # an initial state far from the identity, so that every term of the rule matters
    for name in config.memories:
        params[name]["outer"] = params[name]["outer"] * 2.0
    rng = np.random.default_rng(seed)
    shape = (length, config.heads, config.head_dim)
    queries, keys, values = (jnp.asarray(scale * rng.normal(size=shape)) for _ in range(3))
    logits = jnp.asarray(rng.normal(size=shape[:2]))
    momentum = jax.nn.sigmoid(logits) if config.momentum else None
    return params, Tokens(keys, values, queries, momentum=momentum)


def streamed(level, params, x, cuts):
    """Outputs and last carry of the pieces between the cuts."""
    carry, pieces = levels.start(level, params, x), []
    step = jax.jit(lambda carry, x: levels.run(level, params, carry, x))
    for first, last in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        y, carry = step(carry, jax.tree.map(lambda a: a[first:last], x))  # noqa: B023
        pieces.append(y)
    return jnp.concatenate(pieces), carry
