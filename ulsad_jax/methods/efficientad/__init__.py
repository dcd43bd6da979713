"""Implements EfficientAD: its networks, and how they learn."""

from ulsad_jax.methods.efficientad.method import METHODS as METHODS
