"""Runs: from a preset's name to a trained model; what a script and the command line both call."""

from nestedjax.errors import ConfigError
from nestedjax.run.assemble import (
    Built,
    NestedSystem,
    abstract_state,
    build,
    nested_system,
    new_state,
    optimizer,
)
from nestedjax.run.config import DataConfig, OptimizerConfig, RunConfig, check
from nestedjax.run.data import Batches, text_of, tokenizer_of
from nestedjax.run.folder import has_steps, load_config, read_config, require_config
from nestedjax.run.functions import language_loss, probe, probe_names, sampler, token_losses
from nestedjax.run.presets import run_preset
from nestedjax.run.prompt import default_prompt
from nestedjax.run.saved import from_json, import_modules, to_json
from nestedjax.run.settings import Setting, changed, replaced, settings
from nestedjax.run.trained import Evaluation, Trained, adapted, evaluate, generate, load
from nestedjax.run.training import Began, Event, Result, Sampled, train

__all__ = [
    "Batches",
    "Began",
    "Built",
    "ConfigError",
    "DataConfig",
    "Evaluation",
    "Event",
    "NestedSystem",
    "OptimizerConfig",
    "Result",
    "RunConfig",
    "Sampled",
    "Setting",
    "Trained",
    "abstract_state",
    "adapted",
    "build",
    "changed",
    "check",
    "default_prompt",
    "evaluate",
    "from_json",
    "generate",
    "has_steps",
    "import_modules",
    "language_loss",
    "load",
    "load_config",
    "nested_system",
    "new_state",
    "optimizer",
    "probe",
    "probe_names",
    "read_config",
    "replaced",
    "require_config",
    "run_preset",
    "sampler",
    "settings",
    "text_of",
    "to_json",
    "token_losses",
    "tokenizer_of",
    "train",
]
