"""Image AUROC by type of the largest distance of a patch's features to the nearest one.

The nearest of up to 20,000 patches of the training images, which are drawn at random.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.features import channel_statistics
from ulsad_jax.metrics import image as metrics
from ulsad_jax.models.pyramid import FeaturePyramid

BATCH = 16
BANK = 20_000  # patches at most


def make_measure(*, pool: bool, whiten: bool, layers: str):
    """Returns `measure(trunk, category) -> {type: AUROC}`.

    Args:
        pool: whether to average features over 3 x 3 positions.
        whiten: whether features are whitened, whatever the trunk.
        layers: of the trunk, see `FeaturePyramid.layers`.
    """
    apply = jax.jit(FeaturePyramid("resnet18", layers=layers).apply)

    def extract(trunk, images: np.ndarray) -> np.ndarray:
        rows = np.arange(-(-len(images) // BATCH) * BATCH) % len(images)
        parts = [
            np.asarray(apply(trunk.variables, images[part]))
            for part in rows.reshape(-1, BATCH)
        ]
        found = np.concatenate(parts)[: len(images)]
        return np.asarray(_pool(found)) if pool else found

    def measure(trunk, category) -> dict[str, float]:
        train = extract(trunk, category.train)
        statistics = channel_statistics(train, whiten=whiten)
        bank = statistics.standardize(train).reshape(-1, train.shape[-1])
        chosen = np.random.default_rng(0).permutation(len(bank))[:BANK]
        test = statistics.standardize(extract(trunk, category.test))
        scores = np.asarray(_scores(bank[chosen], test))
        return metrics.by_type(category.types, scores)

    return measure


@jax.jit
def _scores(bank, test):
    """The largest distance of an image's patches to their nearest in the bank.

    Args:
        bank: [n, c].
        test: [m, h, w, c].
    """
    norms = jnp.square(bank).sum(-1)

    def score(image):
        patches = image.reshape(-1, image.shape[-1])
        nearest = (norms - 2 * patches @ bank.T).min(-1)
        return (nearest + jnp.square(patches).sum(-1)).max()

    return jax.lax.map(score, test)


@jax.jit
def _pool(features):
    window = (1, 3, 3, 1)
    ones = jnp.ones((1, *features.shape[1:3], 1))

    def total(x):
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * 4, "SAME")

    return total(features) / total(ones)
