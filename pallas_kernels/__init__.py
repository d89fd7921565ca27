"""Kernels for the memory updates: jax only, one folder per operation."""
