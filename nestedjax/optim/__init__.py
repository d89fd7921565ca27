"""Optimizers as optax gradient transformations: memories of gradients, and their frequencies."""

from nestedjax.optim import features, menu
from nestedjax.optim.adamuon import AdaMuonState, adamuon, scale_by_adamuon
from nestedjax.optim.adamw import adamw
from nestedjax.optim.by_period import AccumulateState, accumulate, by_period, in_steps, in_tokens
from nestedjax.optim.deep_momentum import (
    DeepMomentumState,
    Network,
    deep_momentum,
    scale_by_deep_momentum,
)
from nestedjax.optim.delta_momentum import (
    DeltaMomentumState,
    delta_momentum,
    scale_by_delta_momentum,
)
from nestedjax.optim.dgd import DGDState, dgd, scale_by_dgd, tapped
from nestedjax.optim.ggd import GGDState, ggd, scale_by_gm
from nestedjax.optim.m3 import M3State, m3, scale_by_m3
from nestedjax.optim.matrices import MatrixAxes, last_two
from nestedjax.optim.memories import HasMemories, Memory, Part, boxes_of
from nestedjax.optim.nested_by_period import NestedState, StartState, nested_by_period
from nestedjax.optim.nonlinear_momentum import nonlinear_momentum, scale_by_nonlinear_momentum
from nestedjax.optim.preconditioned_momentum import (
    LearnedState,
    preconditioned_momentum,
    scale_by_learned_preconditioner,
    scale_by_matrix,
    scale_by_preconditioned_momentum,
)
from nestedjax.optim.ranges import Range
from nestedjax.optim.schedules import at_writes, warmup_cosine, warmup_stable_decay
from nestedjax.optim.shampoo import ShampooState, scale_by_shampoo, shampoo
from nestedjax.optim.soap import SoapState, scale_by_soap, soap
from nestedjax.optim.taps import (
    clip_gradients,
    gradient_norm,
    recorded_linear,
    tapped_embedding,
    tapped_linear,
    taps_in,
    watch_inputs,
)

__all__ = [
    "AccumulateState",
    "AdaMuonState",
    "DGDState",
    "DeepMomentumState",
    "DeltaMomentumState",
    "GGDState",
    "LearnedState",
    "M3State",
    "HasMemories",
    "MatrixAxes",
    "Memory",
    "Part",
    "Range",
    "boxes_of",
    "NestedState",
    "Network",
    "ShampooState",
    "SoapState",
    "StartState",
    "accumulate",
    "adamuon",
    "adamw",
    "at_writes",
    "by_period",
    "clip_gradients",
    "deep_momentum",
    "delta_momentum",
    "dgd",
    "features",
    "ggd",
    "gradient_norm",
    "in_steps",
    "in_tokens",
    "last_two",
    "m3",
    "menu",
    "nested_by_period",
    "nonlinear_momentum",
    "preconditioned_momentum",
    "recorded_linear",
    "scale_by_adamuon",
    "scale_by_deep_momentum",
    "scale_by_delta_momentum",
    "scale_by_dgd",
    "scale_by_gm",
    "scale_by_learned_preconditioner",
    "scale_by_m3",
    "scale_by_matrix",
    "scale_by_nonlinear_momentum",
    "scale_by_preconditioned_momentum",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "soap",
    "tapped",
    "tapped_embedding",
    "tapped_linear",
    "taps_in",
    "warmup_cosine",
    "warmup_stable_decay",
    "watch_inputs",
]
