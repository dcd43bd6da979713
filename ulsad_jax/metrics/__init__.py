"""Computes metrics of NumPy arrays; nothing here imports JAX."""
