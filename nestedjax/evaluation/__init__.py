"""Evaluation and sampling of anything that maps tokens and a state to logits and a state."""

from nestedjax.evaluation.generate import generate
from nestedjax.evaluation.perplexity import Losses, Totals, stream_losses
from nestedjax.evaluation.use import (
    Blocks,
    GateReach,
    Moved,
    Rows,
    Use,
    block_losses,
    rows_of,
    use,
)

__all__ = [
    "Blocks",
    "GateReach",
    "Losses",
    "Moved",
    "Rows",
    "Totals",
    "Use",
    "block_losses",
    "generate",
    "rows_of",
    "stream_losses",
    "use",
]
