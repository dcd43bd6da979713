"""ULSAD in JAX: logical and structural anomaly detection in product images."""

__version__ = "0.1.0"
