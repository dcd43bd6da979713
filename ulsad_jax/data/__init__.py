"""The data pipeline: image files, records, TFDS (ArrayRecord), Grain, batches.

Importing this package registers its data sets with TFDS; see `prepare`.
"""

from ulsad_jax.data import prepare as prepare
