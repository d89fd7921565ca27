"""What the optimizer tests share: gradients, a run as one scan, Newton-Schulz in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def run(tx, params, grads):
    """Updates and parameters after each of the gradients [T, ...], as one scan."""

    def body(held, g):
        params, state = held
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (updates, params)

    def go(params, grads):
        return jax.lax.scan(body, (params, tx.init(params)), grads)

    (_, state), (updates, history) = jax.jit(go)(params, grads)
    return updates, history, state


def numpy_ns(x, steps=5, cubic=False):
    """The quintic or cubic iteration from its definition, transposed so that rows <= columns."""
    if x.ndim > 2:
        return np.stack([numpy_ns(m, steps, cubic) for m in x])
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / np.linalg.norm(x)
    for _ in range(steps):
        a = x @ x.T
        if cubic:
            x = 1.5 * x - 0.5 * a @ x
        else:
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x
