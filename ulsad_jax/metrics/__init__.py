"""Metrics on NumPy arrays; nothing here imports JAX."""
