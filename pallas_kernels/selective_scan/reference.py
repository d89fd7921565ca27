"""The recurrence token by token: the oracle of the chunked form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def selective_scan_reference(
    x: Float[Array, "*b T D"],
    step: Float[Array, "*b T D"],
    decay: Float[Array, "D N"],
    write: Float[Array, "*b T N"],
    read: Float[Array, "*b T N"],
    initial: Float[Array, "*b D N"],
) -> tuple[Float[Array, "*b T D"], Float[Array, "*b D N"]]:
    """`h_t = exp(step_t decay) h_{t-1} + step_t x_t write_t`, `y_t = h_t read_t`."""

    def one(h, token):
        x, step, write, read = token
        kept = jnp.exp(step[..., None] * _over(decay, step)) * h
        h = kept + (step * x)[..., None] * write[..., None, :]
        return h, jnp.sum(h * read[..., None, :], axis=-1)

    tokens = [jnp.moveaxis(a, -2, 0) for a in (x, step, write, read)]
    final, y = jax.lax.scan(one, initial, tuple(tokens))
    return jnp.moveaxis(y, 0, -2), final


def _over(decay, step):
    return decay.reshape((1,) * (step.ndim - 1) + decay.shape)
