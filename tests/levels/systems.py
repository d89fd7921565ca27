"""Levels to test with, and an oracle that ticks token by token in numpy and shares no code."""

import jax.numpy as jnp
import numpy as np

from nestedjax import levels


def gradient_level(name, period):
    """A linear memory that learns to predict its input from the input reversed.

    One gradient step a period, with an inner learning rate among its slow parameters.
    """

    def init(params):
        return params["start"]

    def read(params, state, x):
        return x + x[:, ::-1] @ state.T

    def write(params, state, x):
        keys = jnp.tanh(x[:, ::-1])
        error = keys @ state.T - x
        return state - params["rate"] * error.T @ keys / x.shape[0]

    return levels.read_write(name, period, init=init, read=read, write=write)


def running_level(name, period):
    """A decaying sum read by every token after its own write, without a `token`: a chunk memory."""

    def init(params):
        return params["start"]

    def step(params, state, x):
        gain = params["rate"]
        sums = state[None] + gain * jnp.cumsum(x, axis=0)
        return sums[-1] * 0.9, x + sums

    return levels.Level(name, period, init, step)


def incremental_level(name, period):
    """The same memory with its running sum noted, so that a token is O(1)."""

    def token(params, state, sums, x):
        sums = sums + params["rate"] * x
        return sums, x + sums

    level = running_level(name, period)
    return levels.incremental(level, start=lambda params, state: state, token=token)


def frozen_level(name):
    """Never written: a fixed map of each token."""
    return levels.read_write(
        name,
        None,
        init=lambda params: params["start"],
        read=lambda params, state, x: jnp.tanh(x @ state.T),
    )


MAKERS = {
    "gradient": gradient_level,
    "running": running_level,
    "incremental": incremental_level,
}


def make_params(rng, kind, size, dtype=np.float32):
    shape = (size,) if kind in ("running", "incremental") else (size, size)
    return {
        "start": (0.3 * rng.standard_normal(shape)).astype(dtype),
        "rate": np.asarray(0.05, dtype),
    }


class Tick:
    """One level of the oracle: a Python object fed one token at a time."""

    def __init__(self, kind, period, params):
        self.kind, self.period = kind, period
        self.state = np.array(params["start"])
        self.rate = np.array(params["rate"])
        self.seen, self.writes = [], 0

    def __call__(self, x):
        if self.kind == "frozen":
            return np.tanh(self.state @ x)
        self.seen.append(x)
        if self.kind == "gradient":
            y = x + self.state @ x[::-1]
        else:
            y = x + self.state + self.rate * np.sum(self.seen, axis=0)
        if len(self.seen) == self.period:
            self.write()
        return y

    def write(self):
        if self.kind == "gradient":
            total = np.zeros_like(self.state)
            for x in self.seen:
                key = np.tanh(x[::-1])
                total += np.outer(self.state @ key - x, key)
            self.state = self.state - self.rate * total / self.period
        else:
            self.state = 0.9 * (self.state + self.rate * np.sum(self.seen, axis=0))
        self.seen, self.writes = [], self.writes + 1


def tick_chain(specification, params, tokens):
    """Outputs of a chain fed token by token; `specification` lists (kind, period), fast first."""
    ticks = [Tick(kind, period, p) for (kind, period), p in zip(specification, params, strict=True)]
    outputs = []
    for x in tokens:
        for tick in ticks:
            x = tick(x)
        outputs.append(x)
    return np.stack(outputs), ticks
