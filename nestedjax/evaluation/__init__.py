"""Evaluation and sampling of anything that maps tokens and a state to logits and a state."""

from nestedjax.evaluation.generate import generate
from nestedjax.evaluation.perplexity import Losses, Totals, stream_losses

__all__ = ["Losses", "Totals", "generate", "stream_losses"]
