"""A deep memory token by token: slow, obvious, and the oracle of every other form.

Errors come from automatic differentiation of the memory itself, and every matrix is written with
the recurrence as the paper prints it; no code is shared with the chunked forms.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mlp_memory.types import Documents, FastWeights, Readout, Rule, Tokens


def mlp_memory_reference(
    start: FastWeights,
    tokens: Tokens,
    readout: Readout | None,
    documents: Documents | None = None,
    begin: FastWeights | None = None,
    *,
    rule: Rule,
    chunk_size: int,
):
    """Reads [H, d, T] (None without queries) and the fast weights after the last token."""

    def one(start, tokens, readout, documents, begin):
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
            state, read = _token(state, anchor, x, readout, rule, begin)
            return (state, anchor), read

        (state, _), reads = jax.lax.scan(token, (start, start), (tokens, begins, anew))
        return (None if reads is None else reads.T), state

    return jax.vmap(one)(start, tokens, readout, documents, begin)


def _memory(inner, outer, z, rule):
    """M(z) = z + U s(V z) of one memory and one input, or a linear one."""
    if inner is None:
        return z + outer @ z if rule.residual else outer @ z
    return z + outer @ jax.nn.gelu(inner @ z, approximate=True)


def _unit(x):
    return x / jnp.sqrt(jnp.sum(x**2) + 1e-6)


def _context(state, x, readout, rule):
    """What the token's context is, generated at the chunk's start (paper eq. 79-85)."""
    if readout is None:
        return x

    def say(i, z):
        inner, outer = jax.tree.map(lambda a: a[i], (state.inner, state.outer))
        return _memory(inner, outer, z, rule)

    queries = say(4, x.queries) if rule.adaptive_query else x.queries
    gain = rule.gate_gain
    eta = gain * readout.learning_rate @ say(1, x.keys) + readout.learning_rate_bias
    decay = gain * readout.decay @ say(2, x.keys) + readout.decay_bias
    return Tokens(
        queries=_unit(queries),
        keys=_unit(say(0, x.keys)),
        values=say(3, x.values),
        learning_rate=rule.max_learning_rate * jax.nn.sigmoid(eta),
        decay=jax.nn.sigmoid(decay),
        momentum=x.momentum,
    )


def _gradients(inner, outer, x, rule):
    """The token's inner gradients, layer inputs, rates and erasures of one memory at the anchor."""
    linear = inner is None
    out, pull = jax.vjp(lambda v, u: _memory(v, u, x.keys, rule), inner, outer)
    target = x.values
    if rule.values == "self":
        target = _memory(inner, outer, x.values, rule)
        target = _unit(target) if rule.targets == "unit" else target
    base = x.keys if not linear or rule.residual else 0 * x.keys
    error = -target if rule.objective == "dot" else out - target
    if rule.dgd == "functional":  # of 1/2 |M(k) - base|^2, too
        error = error + out - base
    of_inner, of_outer = pull(_clip(error, rule, "error"))
    of_inner, of_outer = (_clip(g, rule, "gradient") for g in (of_inner, of_outer))
    h = x.keys if linear else jax.nn.gelu(inner @ x.keys, approximate=True)
    rates = [x.learning_rate, x.learning_rate]
    if rule.step == "normalised" and not linear:
        rates[1] = rates[1] / (jnp.sum(h**2) + 0.01)
    erased = [_erase(rule, i, rates[i], z) for i, z in enumerate((x.keys, h))]
    if rule.objective == "delta":
        of_outer, erased[1] = jnp.outer(base - target, h), rates[1]
    return (of_inner, of_outer), (x.keys, h), tuple(rates), tuple(erased)


def _clip(array, rule, what):
    if array is None or rule.inner_clip is None or rule.clip not in ("both", what):
        return array
    return array * jnp.minimum(1.0, rule.inner_clip / jnp.sqrt(jnp.sum(array**2) + 1e-12))


def _erase(rule, layer, eta, z):
    if rule.dgd in ("layerwise", ("input_only", "output_only")[layer]):
        strength = eta * jnp.sum(z**2)
        return eta / (1 + strength if rule.erase == "implicit" else jnp.maximum(1.0, strength))
    return jnp.zeros_like(eta)


def _write(weight, momentum, begin, gradient, z, eta, erase, x, heard):
    """W (decay I - erase z z^T) + S of one matrix, S = momentum S - eta gradient."""
    step = -eta * heard * gradient
    if momentum is not None:
        step = momentum = x.momentum * momentum + step
    kept = x.decay * weight if begin is None else begin + x.decay * (weight - begin)
    return kept - erase * jnp.outer(weight @ z, z) + step, momentum


def _token(state: FastWeights, anchor: FastWeights, x: Tokens, readout, rule, begin):
    """Write one token with the gradient at the anchor; read."""
    x, n = _context(anchor, x, readout, rule), state.outer.shape[0]
    begin = begin if rule.decay_to == "start" else None
    heard = jnp.array([float(i not in rule.silent) for i in range(n)], state.outer.dtype)
    static = jnp.array([i in rule.static for i in range(n)])[:, None, None]
    found = jax.vmap(partial(_gradients, x=x, rule=rule))(anchor.inner, anchor.outer)
    new: dict[str, Any] = {}
    for layer, name in enumerate(("inner", "outer")):
        old = getattr(state, name), getattr(state, f"{name}_momentum")
        written = old
        if old[0] is not None and (name == "outer" or rule.written == "both"):
            base, (gradient, z, eta, erase) = getattr(begin, name, None), (p[layer] for p in found)
            axes = (0, 0, 0, 0, 0, 0, 0, None, 0)
            written = jax.vmap(_write, in_axes=axes)(
                old[0], old[1], base, gradient, z, eta, erase, x, heard
            )
        kept = jax.tree.map(lambda a, b: jnp.where(static, a, b), old, written)
        new[name], new[f"{name}_momentum"] = kept
    after = FastWeights(**new)
    if x.queries is None:
        return after, None
    source = {"running_prev": state, "running": after, "anchor": anchor}[rule.read]
    inner, outer = jax.tree.map(lambda a: a[-1], (source.inner, source.outer))
    return after, _memory(inner, outer, x.queries, rule)
