"""Newton-Schulz iterations: the orthogonal factor of a stack of matrices by products alone."""

from pallas_kernels.newton_schulz.api import COEFFICIENTS, newton_schulz

__all__ = ["COEFFICIENTS", "newton_schulz"]
