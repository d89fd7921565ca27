"""Optimizers as optax gradient transformations."""

from nestedjax.optim.by_period import AccumulateState, accumulate, by_period, in_steps, in_tokens

__all__ = ["AccumulateState", "accumulate", "by_period", "in_steps", "in_tokens"]
