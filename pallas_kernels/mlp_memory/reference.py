"""A deep memory token by token: slow, obvious, and the oracle of every other form.

Errors come from automatic differentiation of the memory itself, and every matrix is written with
the recurrence as the paper prints it; no code is shared with the chunked forms.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.mlp_memory.types import Documents, FastWeights, Readout, Rule, Tokens


def mlp_memory_reference(
    start: FastWeights,
    tokens: Tokens,
    readout: Readout | None,
    documents: Documents | None = None,
    *,
    rule: Rule,
    chunk_size: int,
):
    """Reads [H, d, T] (None without queries) and the fast weights after the last token."""

    def one(start, tokens, readout, documents):
        tokens = jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), tokens)  # tokens first
        index = jnp.arange(tokens.keys.shape[0])
        begins, anew = index % chunk_size == 0, None
        if documents is not None:
            anew = begins & documents.begins[index // chunk_size]

        def token(carry, inputs):
            state, anchor = carry
            x, begins, anew = inputs
            if documents is not None:
                momenta = (None if a is None else 0 * a for a in start[2:])
                fresh = FastWeights(documents.inner, documents.outer, *momenta)
                state = jax.tree.map(lambda new, old: jnp.where(anew, new, old), fresh, state)
            anchor = jax.tree.map(lambda new, old: jnp.where(begins, new, old), state, anchor)
            state, read = _token(state, anchor, x, readout, rule)
            return (state, anchor), read

        (state, _), reads = jax.lax.scan(token, (start, start), (tokens, begins, anew))
        return (None if reads is None else reads.T), state

    return jax.vmap(one)(start, tokens, readout, documents)


def _memory(inner, outer, z):
    """M(z) = z + U s(V z) of one memory and one input."""
    return z + outer @ jax.nn.gelu(inner @ z, approximate=True)


def _unit(x):
    return x / jnp.sqrt(jnp.sum(x**2) + 1e-6)


def _context(state, x, readout, rule):
    """What the token's context is, generated at the chunk's start (paper eq. 79-85)."""
    if readout is None:
        return x
    say = lambda i, z: _memory(state.inner[i], state.outer[i], z)  # noqa: E731
    queries = say(4, x.queries) if rule.adaptive_query else x.queries
    eta = readout.learning_rate @ say(1, x.keys) + readout.learning_rate_bias
    decay = readout.decay @ say(2, x.keys) + readout.decay_bias
    return Tokens(
        queries=_unit(queries),
        keys=_unit(say(0, x.keys)),
        values=say(3, x.values),
        learning_rate=rule.max_learning_rate * jax.nn.sigmoid(eta),
        decay=jax.nn.sigmoid(decay),
        momentum=x.momentum,
    )


def _gradients(inner, outer, x, rule):
    """The token's inner gradients, layer inputs and erasures of one memory at the anchor."""
    out, pull = jax.vjp(lambda v, u: _memory(v, u, x.keys), inner, outer)
    target = _memory(inner, outer, x.values) if rule.values == "self" else x.values
    error = -target if rule.objective == "dot" else out - target
    if rule.dgd == "functional":  # of 1/2 |M(k) - k|^2, too
        error = error + out - x.keys
    gradients = pull(_clip(error, rule))
    gradients = tuple(_clip(gradient, rule) for gradient in gradients)
    inputs = x.keys, jax.nn.gelu(inner @ x.keys, approximate=True)
    return (
        gradients,
        inputs,
        tuple(_erase(rule, i, x.learning_rate, z) for i, z in enumerate(inputs)),
    )


def _clip(array, rule):
    if rule.inner_clip is None:
        return array
    return array * jnp.minimum(1.0, rule.inner_clip / jnp.sqrt(jnp.sum(array**2) + 1e-12))


def _erase(rule, layer, eta, z):
    if rule.dgd == "layerwise" or (rule.dgd == "input_only" and layer == 0):
        strength = eta * jnp.sum(z**2)
        return eta / (1 + strength if rule.erase == "implicit" else jnp.maximum(1.0, strength))
    return jnp.zeros_like(eta)


def _write(weight, momentum, gradient, z, erase, x):
    """W (decay I - erase z z^T) + S of one matrix, S = momentum S - eta gradient."""
    step = -x.learning_rate * gradient
    if momentum is not None:
        step = momentum = x.momentum * momentum + step
    return x.decay * weight - erase * jnp.outer(weight @ z, z) + step, momentum


def _token(state: FastWeights, anchor: FastWeights, x: Tokens, readout, rule):
    """Write one token with the gradient at the anchor; read."""
    x = _context(anchor, x, readout, rule)
    found = jax.vmap(partial(_gradients, x=x, rule=rule))(anchor.inner, anchor.outer)
    leaves = []
    pairs = (state.inner, state.inner_momentum), (state.outer, state.outer_momentum)
    for (weight, momentum), of in zip(pairs, zip(*found, strict=True), strict=True):
        leaves.append(jax.vmap(partial(_write, x=x))(weight, momentum, *of))
    (inner, inner_momentum), (outer, outer_momentum) = leaves
    new = FastWeights(inner, outer, inner_momentum, outer_momentum)
    if x.queries is None:
        return new, None
    source = {"running_prev": state, "running": new, "anchor": anchor}[rule.read]
    return new, _memory(source.inner[-1], source.outer[-1], x.queries)
