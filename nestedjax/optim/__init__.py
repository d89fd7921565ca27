"""Optimizers as optax gradient transformations."""

from nestedjax.optim.adamuon import AdaMuonState, adamuon, scale_by_adamuon
from nestedjax.optim.by_period import AccumulateState, accumulate, by_period, in_steps, in_tokens
from nestedjax.optim.m3 import M3State, m3, scale_by_m3
from nestedjax.optim.matrices import MatrixAxes, last_two
from nestedjax.optim.nested_by_period import NestedState, StartState, nested_by_period
from nestedjax.optim.nonlinear_momentum import nonlinear_momentum, scale_by_nonlinear_momentum

__all__ = [
    "AccumulateState",
    "AdaMuonState",
    "M3State",
    "MatrixAxes",
    "NestedState",
    "StartState",
    "accumulate",
    "adamuon",
    "by_period",
    "in_steps",
    "in_tokens",
    "last_two",
    "m3",
    "nested_by_period",
    "nonlinear_momentum",
    "scale_by_adamuon",
    "scale_by_m3",
    "scale_by_nonlinear_momentum",
]
