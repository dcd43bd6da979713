"""Implements DRAEM: its networks, the defects that are drawn, and how they learn."""

from ulsad_jax.methods.draem.method import METHODS as METHODS
