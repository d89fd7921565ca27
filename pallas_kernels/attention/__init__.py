"""Softmax attention: JAX's own forms of it, cuDNN and splash attention, behind one call."""

from pallas_kernels.attention.api import attention, default_implementation

__all__ = ["attention", "default_implementation"]
