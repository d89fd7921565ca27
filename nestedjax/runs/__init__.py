"""Runs: from a configuration to the objects that train it, and from a run folder to a model."""

from nestedjax.runs.assemble import (
    NestedSystem,
    abstract_model,
    abstract_state,
    datasets,
    nested_system,
    new_model,
    new_state,
    optimizer,
    place_new_state,
    vocabulary_of,
)
from nestedjax.runs.folder import Model, load, load_config, require_config, save_config
from nestedjax.runs.functions import language_loss, probe, probe_names, sampler, token_losses

__all__ = [
    "Model",
    "NestedSystem",
    "abstract_model",
    "abstract_state",
    "datasets",
    "language_loss",
    "load",
    "load_config",
    "nested_system",
    "new_model",
    "new_state",
    "optimizer",
    "place_new_state",
    "probe",
    "probe_names",
    "require_config",
    "sampler",
    "save_config",
    "token_losses",
    "vocabulary_of",
]
