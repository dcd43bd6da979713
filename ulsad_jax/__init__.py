"""Detects logical and structural anomalies in product images: ULSAD in JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ulsad_jax.detector import Detector as Detector
    from ulsad_jax.detector import Result as Result

__version__ = "0.1.0"


def __getattr__(name: str):
    """Imports `Detector` and `Result` on first use, as importing JAX takes seconds."""
    if name in ("Detector", "Result"):
        from ulsad_jax import detector

        return getattr(detector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
