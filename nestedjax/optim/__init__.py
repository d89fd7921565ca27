"""Optimizers as optax gradient transformations."""

from nestedjax.optim.by_period import AccumulateState, accumulate, by_period, in_steps, in_tokens
from nestedjax.optim.nested_by_period import NestedState, StartState, nested_by_period

__all__ = [
    "AccumulateState",
    "NestedState",
    "StartState",
    "accumulate",
    "by_period",
    "in_steps",
    "in_tokens",
    "nested_by_period",
]
