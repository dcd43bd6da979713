"""Implements a Gaussian of an image's mean feature, which scores images as a whole.

Sugawara & Imamura, "PUAD: Frustratingly Simple Method for Robust Anomaly Detection",
ICIP 2024, add this score to that of another method's map.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.base import Batch, Method, Spec, State

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Pooled(Method):
    """One Gaussian of the features' mean over all positions; it has no map.

    The score is the Mahalanobis distance. The covariance is that of Ledoit & Wolf, "A
    Well-Conditioned Estimator for Large-Dimensional Covariance Matrices", 2004.
    """

    num_epochs: ClassVar[int | None] = 1
    sees_every_image: ClassVar[bool] = True

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Reserves a row for each training image."""
        del key
        channels = spec.batch.features.shape[-1]
        rows = {
            "means": jnp.zeros((spec.num_images, channels)),
            "seen": jnp.zeros(spec.num_images, bool),
        }
        return State(jnp.zeros((), jnp.int32), {}, rows)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Writes the images' mean features to their rows."""
        del key
        new = batch.features.mean((1, 2)), batch.index, batch.valid
        if self.axis_name is not None:
            new = jax.lax.all_gather(new, self.axis_name, tiled=True)
        means, index, valid = new
        rows = jnp.where(valid, index, len(state.training["seen"]))  # padding: no row
        training = {
            "means": state.training["means"].at[rows].set(means, mode="drop"),
            "seen": state.training["seen"].at[rows].set(True, mode="drop"),
        }
        return State(state.step + 1, state.model, training), {}

    def finish(self, state: State) -> State:
        """Fits the Gaussian to the images that were seen, in float64."""
        rows = jax.device_get(state.training)
        seen = rows["means"][rows["seen"]].astype(np.float64)
        model = {name: x.astype(np.float32) for name, x in _fit(seen).items()}
        return state.replace(model=model)

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns no map."""
        del model, batch
        return {}

    def scores(self, model: Any, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """Returns the score `pooled`: the mean feature's Mahalanobis distance."""
        x = batch.features.mean((1, 2)) - model["mean"]
        white = jnp.matmul(x, model["factor"], precision="highest")
        return {"pooled": jnp.sqrt(jnp.square(white).sum(-1))}


METHODS = {"pooled": Pooled}


def _fit(x: Float[np.ndarray, "n c"]) -> dict[str, Float[np.ndarray, "..."]]:
    """Returns the mean, and the factor F with |(x - mean) F| the Mahalanobis distance.

    A single image, or images that are all the same, have no covariance: the identity
    takes its place.
    """
    from sklearn.covariance import ledoit_wolf  # training steps do without scikit-learn

    mean = x.mean(0)
    covariance = np.eye(x.shape[1])
    if np.ptp(x, axis=0).any():
        covariance, _ = ledoit_wolf(x - mean, assume_centered=True)
    variances, directions = np.linalg.eigh(covariance)
    # Rounding may leave a direction without variance.
    variances = np.maximum(variances, 1e-9 * variances.max())
    return {"mean": mean, "factor": directions / np.sqrt(variances)}
