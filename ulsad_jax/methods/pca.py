"""Implements PCA: what of a feature lies outside the principal subspace.

The map is the feature reconstruction error of Ndiour et al., "Subspace Modeling for
Fast Out-of-Distribution and Anomaly Detection", ICIP 2022: the squared norm, as in
Jackson & Mudholkar, "Control Procedures for Residuals Associated With Principal
Component Analysis", Technometrics 1979.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.base import Batch, Method, Spec, State
from ulsad_jax.runtime.rules import SHARE, Rule
from ulsad_jax.scoring.calibration import enlarge_and_blur

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Pca(Method):
    """PCA of the features of all positions; the map is the squared residual.

    Attributes:
        variance: share of the variance that the principal subspace has to exceed. It
            leaves out at least one direction.
    """

    num_epochs: ClassVar[int | None] = 1
    sees_every_image: ClassVar[bool] = True

    rules: ClassVar[Mapping[str, Rule]] = {"methods.pca.variance": SHARE}

    variance: float = 0.97

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Sets every sum to 0."""
        del key
        c = spec.batch.features.shape[-1]
        sums = {
            "count": jnp.zeros((), jnp.int32),
            "first": jnp.zeros(c),
            "second": jnp.zeros((c, c)),
        }
        return State(jnp.zeros((), jnp.int32), {}, sums)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Adds the features of a batch and their outer products to the sums.

        Features are standardised: their sums lose nothing by not being centred.
        """
        del key
        _, height, width, _ = batch.features.shape
        x = batch.features * batch.valid[:, None, None, None]
        new = {
            "count": height * width * batch.valid.sum(dtype=jnp.int32),
            "first": x.sum((0, 1, 2)),
            # Accelerators would round the factors to bfloat16.
            "second": jnp.einsum("bhwc,bhwd->cd", x, x, precision="highest"),
        }
        if self.axis_name is not None:
            new = jax.lax.psum(new, self.axis_name)
        sums = jax.tree.map(jnp.add, state.training, new)
        return State(state.step + 1, state.model, sums), {}

    def finish(self, state: State) -> State:
        """Computes the mean and the directions outside the subspace, in float64."""
        sums = jax.device_get(state.training)
        mean = sums["first"].astype(np.float64) / sums["count"]
        covariance = sums["second"] / np.float64(sums["count"]) - np.outer(mean, mean)
        variances, directions = np.linalg.eigh(covariance)
        variances = np.maximum(variances[::-1], 0.0)  # from the largest one down
        explained = np.cumsum(variances)
        kept = np.searchsorted(explained, self.variance * explained[-1], side="right")
        # A direction has to be left, and all are where features never change.
        kept = min(kept + 1, len(mean) - 1) if explained[-1] else 0
        outside = directions[:, ::-1][:, kept:]
        model = {"mean": mean, "outside": outside}
        model = {name: x.astype(np.float32) for name, x in model.items()}
        return State(state.step, model, {"count": state.training["count"]})

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the map `residual`: the squared distance to the subspace."""
        x = batch.features - model["mean"]
        residual = jnp.matmul(x, model["outside"], precision="highest")
        squares = jnp.square(residual).sum(-1)
        return {"residual": enlarge_and_blur(squares, batch.image.shape[1:3])}


METHODS = {"pca": Pca}
