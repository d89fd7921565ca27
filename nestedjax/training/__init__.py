"""Training: a loop over functions, exact to the last bit across kills and resumes."""

from nestedjax.training.events import Claimed, Event, Saved, Started, Stepped, Stopping, Validated
from nestedjax.training.loop import Dataset, Hook, LoopConfig, Result, train
from nestedjax.training.metrics import MetricsWriter, read_metrics
from nestedjax.training.nonfinite import Nonfinite, TrainingError, locate_nonfinite
from nestedjax.training.state import TrainState, init_state, state_shardings
from nestedjax.training.step import LossFn, make_dispatch, make_evaluate, stateless

__all__ = [
    "Claimed",
    "Dataset",
    "Event",
    "Hook",
    "LoopConfig",
    "LossFn",
    "MetricsWriter",
    "Nonfinite",
    "Result",
    "Saved",
    "Started",
    "Stepped",
    "Stopping",
    "TrainState",
    "TrainingError",
    "Validated",
    "init_state",
    "locate_nonfinite",
    "make_dispatch",
    "make_evaluate",
    "read_metrics",
    "state_shardings",
    "stateless",
    "train",
]
