"""Evaluation and sampling of anything that maps tokens and a state to logits and a state."""

from nestedjax.evaluation.generate import generate

__all__ = ["generate"]
