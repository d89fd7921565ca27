"""Executions that go token by token.

`reference_step` is the recurrence as the equations print it, with dense gradients from automatic
differentiation of the architecture: the oracle. `sequential_step` is for combinations without a
chunk-parallel form: it takes the rank-one gradients of a whole chunk in parallel, and only the
recurrence goes token by token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nestedjax.memory.architectures import Features, Weights
from nestedjax.memory.state import (
    Memory,
    MemoryState,
    Tokens,
    Window,
    mean_rates,
    next_window,
    running_start,
    with_window,
)
from pallas_kernels import solve


class _Carry(NamedTuple):
    weights: Weights
    momentum: Weights | None


def _solve(memory: Memory, old: "_Carry", window: Window, token: Tokens) -> "_Carry":
    """`argmin_W 1/2 sum_i factor learning_rate_i |W k_i - v_i|^2 + 1/2 |W - decay W_{t-1}|^2`.

    The normal equations are a system over features; the push-through identity turns them into one
    over the tokens of the window, of which there are fewer.
    """
    assert memory.objective.factor is not None
    keys, learning_rate = window.keys, memory.objective.factor * window.learning_rate[:, None]
    weight = old.weights[0] if token.decay is None else token.decay * old.weights[0]
    system = jnp.eye(len(keys), dtype=weight.dtype) + learning_rate * (keys @ keys.T)
    residual = keys @ weight.T  # what is erased; without a write nothing takes its place
    residual = residual if memory.silent else residual - window.values
    return _Carry((weight - solve(system, learning_rate * residual).T @ keys,), None)


def _write(
    memory: Memory, carry: _Carry, gradients: Weights, inputs: Features, token: Tokens
) -> _Carry:
    """One token's write; `gradients` are multiplied by their learning rates already."""
    learning_rate = token.learning_rate
    decay = jnp.ones_like(learning_rate) if token.decay is None else token.decay
    added = tuple(-g for g in gradients)
    if carry.momentum is not None:
        assert token.momentum is not None
        added = tuple(token.momentum * s + a for s, a in zip(carry.momentum, added, strict=True))
    weights = []
    for m, (a, s, x) in enumerate(zip(carry.weights, added, inputs, strict=True)):
        erase = memory.erase(m, learning_rate, decay, x)
        new = decay * a + s
        if erase is not None and memory.rule.diagonal:
            new = new - erase * a * (x * x)[None, :]
        elif erase is not None:
            new = new - erase * jnp.outer(a @ x, x)
        weights.append(
            new if memory.retention.shrink is None else memory.retention.shrink(new, learning_rate)
        )
    return _Carry(tuple(weights), None if carry.momentum is None else added)


def _averaged(anchor: Weights, old: _Carry, gradients: Weights, rate: Array) -> _Carry:
    """`mean_gradient`: `momentum` is the sum of the chunk's gradients up to the token."""
    assert old.momentum is not None
    sums = tuple(s + g for s, g in zip(old.momentum, gradients, strict=True))
    return _Carry(tuple(a - rate * s for a, s in zip(anchor, sums, strict=True)), sums)


def _read(
    memory: Memory, anchor: Weights, old: _Carry, new: _Carry, query: Float[Array, " dk"]
) -> Float[Array, " dv"]:
    if memory.read == "anchor":
        return memory.architecture.apply(anchor, query)
    carry = new if memory.read == "running" else old
    return memory.architecture.apply(memory.link(carry.weights), query)


def _dense_gradients(memory: Memory, anchor: Weights, token: Window) -> Weights:
    """The learning rate times the gradient of one token at the anchor, as dense matrices."""
    output, pull = jax.vjp(lambda w: memory.architecture.apply(w, token.keys), anchor)
    (gradients,) = pull(memory.output_error(output, token))
    penalty = memory.objective.penalty
    if penalty is not None and not memory.silent:
        gradients = (gradients[0] + jax.grad(penalty)(anchor[0], token.values),)
    inputs, _ = memory.factors(anchor, token)
    return tuple(
        memory.write(token.learning_rate, x) * g for g, x in zip(gradients, inputs, strict=True)
    )


def reference_step(
    memory: Memory, state: MemoryState, tokens: Tokens
) -> tuple[MemoryState, Float[Array, "C dv"]]:
    """One chunk, token by token with dense gradients: the definition.

    Args:
      memory: its menu entries.
      state: at the chunk's start, the anchor.
      tokens: [C, ...], prepared.

    Returns:
      `(state, reads [C, dv])`.
    """
    anchor = memory.link(state.weights)
    window = memory.rule.window

    def token_step(
        carry: tuple[_Carry, Any], inputs: tuple[Tokens, Array]
    ) -> tuple[tuple[_Carry, Any], Float[Array, " dv"]]:
        (old, past), (token, place) = carry, inputs
        present = jax.tree.map(
            lambda x: x[None],
            Window(token.keys, token.values, token.learning_rate, token.threshold),
        )
        recent = (
            present
            if past is None
            else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), past, present)
        )
        if memory.rule.solve:
            new = _solve(memory, old, recent, token)
        else:
            each = jax.vmap(lambda one: _dense_gradients(memory, anchor, one))(recent)
            gradients = tuple(g.sum(0) for g in each)
            if memory.rule.mean:
                new = _averaged(anchor, old, gradients, mean_rates(place, token))
            else:
                new = _write(memory, old, gradients, memory.factors(anchor, token)[0], token)
        past = None if past is None else jax.tree.map(lambda x: x[-(window - 1) :], recent)
        return (new, past), _read(memory, anchor, old, new, token.queries)

    first = running_start(memory, state)
    places = jnp.arange(len(tokens.learning_rate), dtype=jnp.int32)
    start = (_Carry(first.weights, first.momentum), state.window)
    (end, past), reads = jax.lax.scan(token_step, start, (tokens, places))
    return MemoryState(end.weights, end.momentum if memory.rule.momentum else None, past), reads


def sequential_step(
    memory: Memory, state: MemoryState, tokens: Tokens
) -> tuple[MemoryState, Float[Array, "C dv"]]:
    """One chunk with its gradients in parallel and its recurrence token by token.

    Args:
      memory: its menu entries.
      state: at the chunk's start, the anchor.
      tokens: [C, ...], prepared.

    Returns:
      `(state, reads [C, dv])`.
    """
    anchor = memory.link(state.weights)
    extended = with_window(state, tokens)
    inputs, errors = memory.factors(anchor, extended)
    written = tuple(
        memory.write(extended.learning_rate, x)[:, None] * e
        for x, e in zip(inputs, errors, strict=True)
    )
    window = memory.rule.window
    # the gradients of a chunk once each, then gathered: a token is in up to `window` updates
    index = jnp.arange(len(tokens.learning_rate))[:, None] + jnp.arange(window)[None, :]
    scanned = jax.tree.map(lambda a: a[index], (inputs, written, extended))

    def token_step(
        old: _Carry, xs: tuple[Features, Features, Window, Tokens]
    ) -> tuple[_Carry, Float[Array, " dv"]]:
        inputs, written, recent, token = xs
        if memory.rule.solve:
            new = _solve(memory, old, recent, token)
        else:
            gradients = tuple(e.T @ x for e, x in zip(written, inputs, strict=True))
            new = _write(memory, old, gradients, tuple(x[-1] for x in inputs), token)
        return new, _read(memory, anchor, old, new, token.queries)

    start = _Carry(state.weights, state.momentum)
    end, reads = jax.lax.scan(token_step, start, (*scanned, tokens))
    return MemoryState(end.weights, end.momentum, next_window(memory, extended)), reads


def running_token(
    memory: Memory, anchor: MemoryState, running: MemoryState, tokens: Tokens
) -> tuple[MemoryState, Array]:
    """One token of an unfinished chunk, in time that does not depend on the chunk's length.

    Args:
      memory: the point of the product.
      anchor: at the chunk's start, where gradients are taken.
      running: after the tokens before this one.
      tokens: [1, ...], prepared.

    Returns:
      `(running after the token, read [1, dv])`.
    """
    weights = memory.link(anchor.weights)
    recent = with_window(running, tokens)
    inputs, errors = memory.factors(weights, recent)
    token = jax.tree.map(lambda a: a[0], tokens)
    old = _Carry(running.weights, running.momentum)
    if memory.rule.solve:
        new = _solve(memory, old, recent, token)
    else:
        gradients = tuple(
            (memory.write(recent.learning_rate, x)[:, None] * e).T @ x
            for x, e in zip(inputs, errors, strict=True)
        )
        if running.place is not None:
            new = _averaged(weights, old, gradients, mean_rates(running.place, token))
        else:
            new = _write(memory, old, gradients, tuple(x[-1] for x in inputs), token)
    read = _read(memory, weights, old, new, token.queries)
    place = None if running.place is None else running.place + 1
    after = MemoryState(new.weights, new.momentum, next_window(memory, recent), place)
    return after, read[None]
