"""Implements ULSAD: its networks, its loss terms and the checks of them."""

from ulsad_jax.methods.ulsad.method import METHODS as METHODS
