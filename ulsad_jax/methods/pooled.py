"""Implements Gaussians of descriptions of whole images, which score images as a whole.

Sugawara & Imamura, "PUAD: Frustratingly Simple Method for Robust Anomaly Detection",
ICIP 2024, add such a score to that of another method's map.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.base import Batch, State
from ulsad_jax.methods.rows import Rows, read_seen
from ulsad_jax.runtime.rules import Rule, at_least

if TYPE_CHECKING:
    from jaxtyping import Array, Float

POSITIONS = 256  # largest number of positions of a training image that words are from
ROUNDING = 1e-6  # largest difference by rounding, as a share of the largest value
PATCHES = 10_000  # largest number of features that k-means groups


@dataclasses.dataclass(frozen=True)
class Pooled(Rows):
    """One Gaussian of the features' mean over all positions; it has no map.

    The score is the Mahalanobis distance. The covariance is that of Ledoit & Wolf, "A
    Well-Conditioned Estimator for Large-Dimensional Covariance Matrices", 2004.
    """

    def finish(self, state: State) -> State:
        """Fits the model to the images that were seen."""
        return State(state.step, self._fit(np.asarray(read_seen(state)), state), {})

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns no map."""
        del model, batch
        return {}

    def scores(self, model: Any, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """Returns the score `pooled`: the mean feature's Mahalanobis distance."""
        return {"pooled": _distance(model, batch.features.mean((1, 2)))}

    def describe(
        self, features: Float[Array, "b h w c"], key: jax.Array
    ) -> Float[Array, "b ..."]:
        """Returns the mean feature of each image."""
        del key
        return features.mean((1, 2))

    def _fit(self, rows: Float[np.ndarray, "n ..."], state: State) -> dict[str, Any]:
        """Returns the model."""
        del state
        return fit_gaussian(rows)


@dataclasses.dataclass(frozen=True)
class Words(Pooled):
    """One Gaussian of how often each visual word occurs in an image; it has no map.

    Words are the centers of k-means over the training features (Csurka et al., "Visual
    Categorization with Bags of Keypoints", 2004). An image is described by
    log(1 + 256 * the share of its positions nearest to each word). Of training images
    larger than 256 positions, as many random ones are looked at. The score is as that
    of `Pooled`.

    Attributes:
        count: number of words; fewer if there are fewer features.
    """

    rules: ClassVar[Mapping[str, Rule]] = {"methods.words.count": at_least(2)}

    count: int = 64

    def scores(self, model: Any, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """Returns the score `words`: the Mahalanobis distance of the word counts."""
        return {"words": _distance(model, _describe(model["words"], batch.features))}

    def describe(
        self, features: Float[Array, "b h w c"], key: jax.Array
    ) -> Float[Array, "b p c"]:
        """Returns the features of all positions, or of random ones."""
        flat = features.reshape(len(features), -1, features.shape[-1])
        if flat.shape[1] <= POSITIONS:
            return flat
        chosen = jax.random.choice(key, flat.shape[1], (POSITIONS,), replace=False)
        return flat[:, chosen]

    def _fit(self, rows: Float[np.ndarray, "n p c"], state: State) -> dict[str, Any]:
        from sklearn.cluster import KMeans  # training steps do without scikit-learn

        rng = np.random.default_rng(np.asarray(state.training["key"]))
        patches = rng.permutation(rows.reshape(-1, rows.shape[-1]))[:PATCHES]
        seed = int(rng.integers(2**31))
        found = KMeans(min(self.count, len(patches)), n_init=1, random_state=seed)
        with warnings.catch_warnings():  # equal features make fewer words
            warnings.simplefilter("ignore")
            words = found.fit(patches).cluster_centers_.astype(np.float32)
        counts = [jax.device_get(_describe(words, row[None, None]))[0] for row in rows]
        return fit_gaussian(np.stack(counts)) | {"words": words}


METHODS = {"pooled": Pooled, "words": Words}


def _describe(
    words: Float[Array, "k c"], features: Float[Array, "b h w c"]
) -> Float[Array, "b k"]:
    """Returns the logarithms of the word counts of 256 positions."""
    products = jnp.matmul(features, words.T, precision="highest")
    nearest = (jnp.square(words).sum(-1) - 2 * products).argmin(-1)
    share = jax.nn.one_hot(nearest, len(words)).mean((1, 2))
    return jnp.log1p(POSITIONS * share)


def _distance(model: Mapping[str, Array], x: Float[Array, "b c"]) -> Float[Array, " b"]:
    """Returns Mahalanobis distances."""
    white = jnp.matmul(x - model["mean"], model["factor"], precision="highest")
    return jnp.sqrt(jnp.square(white).sum(-1))


def fit_gaussian(x: Float[np.ndarray, "n c"]) -> dict[str, Float[np.ndarray, "..."]]:
    """Fits a Gaussian in float64.

    Returns:
        `mean` [c], and `factor` [c, c] with |(x - mean) factor| the Mahalanobis
        distance, float32. A single image, or images that are all the same but for
        rounding, have no covariance: the identity takes its place.
    """
    from sklearn.covariance import ledoit_wolf  # training steps do without scikit-learn

    x = x.astype(np.float64)
    mean = x.mean(0)
    covariance = np.eye(x.shape[1])
    if np.ptp(x, axis=0).max() > ROUNDING * np.abs(x).max():
        covariance, _ = ledoit_wolf(x - mean, assume_centered=True)
    variances, directions = np.linalg.eigh(covariance)
    # Rounding may leave a direction without variance.
    variances = np.maximum(variances, 1e-9 * variances.max())
    model = {"mean": mean, "factor": directions / np.sqrt(variances)}
    return {name: values.astype(np.float32) for name, values in model.items()}
