"""Image files -> records -> TFDS (ArrayRecord) -> Grain -> batches.

Importing this package registers its data sets with TFDS (see `builder`).
"""

from ulsad_jax.data import prepare as prepare
