"""Kernels for the memory updates, and attention: jax only, one folder per operation."""
