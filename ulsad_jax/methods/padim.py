"""Implements PaDiM: a Gaussian at every position of the feature grid.

Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and
Localization", ICPR 2021 Workshops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from ulsad_jax.methods.base import Batch, Method, Spec, State
from ulsad_jax.runtime.rules import POSITIVE, Rule, at_least
from ulsad_jax.scoring.calibration import enlarge_and_blur

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Padim(Method):
    """PaDiM: one Gaussian per position; the map is the Mahalanobis distance to it.

    Attributes:
        channels: number of feature channels to use, chosen at random; all channels if
            there are fewer.
        epsilon: number added to the variances, in units of standardised features.
    """

    num_epochs: ClassVar[int | None] = 1
    sees_every_image: ClassVar[bool] = True

    rules: ClassVar[Mapping[str, Rule]] = {
        "methods.padim.channels": at_least(1),
        "methods.padim.epsilon": POSITIVE,
    }

    channels: int = 100
    epsilon: float = 0.01

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Chooses the channels and sets every sum to 0."""
        _, height, width, available = spec.batch.features.shape
        d = min(self.channels, available)
        chosen = jnp.sort(jax.random.permutation(key, available)[:d])
        sums = {
            "count": jnp.zeros(()),
            "first": jnp.zeros((height, width, d)),
            "second": jnp.zeros((height, width, d, d)),
        }
        return State(jnp.zeros((), jnp.int32), {"channels": chosen}, sums)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Adds the features of a batch and their outer products to the sums."""
        del key
        x = batch.features[..., state.model["channels"]]
        x = x * batch.valid[:, None, None, None]
        new = {
            "count": batch.valid.sum(dtype=jnp.float32),
            "first": x.sum(0),
            # Accelerators would round the factors to bfloat16.
            "second": jnp.einsum("bhwc,bhwd->hwcd", x, x, precision="highest"),
        }
        if self.axis_name is not None:
            new = jax.lax.psum(new, self.axis_name)
        sums = jax.tree.map(jnp.add, state.training, new)
        return State(state.step + 1, state.model, sums), {}

    def finish(self, state: State) -> State:
        """Computes means and whitening matrices from the sums.

        The whitening matrix W is the inverse of the Cholesky factor of the covariance,
        so that |W (x - mean)| is the Mahalanobis distance.
        """
        model = state.model | _finish(state.training, self.epsilon)
        return State(state.step, model, {"count": state.training["count"]})

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the map `patch`: the Mahalanobis distance at each position."""
        x = batch.features[..., model["channels"]] - model["mean"]
        white = jnp.einsum("hwij,bhwj->bhwi", model["factor"], x, precision="highest")
        distances = jnp.sqrt(jnp.square(white).sum(-1))
        return {"patch": enlarge_and_blur(distances, batch.image.shape[1:3])}


METHODS = {"padim": Padim}


@jax.jit
def _finish(sums: dict[str, jax.Array], epsilon: float) -> dict[str, jax.Array]:
    count = sums["count"]
    mean = sums["first"] / count
    outer = mean[..., :, None] * mean[..., None, :]
    covariance = (sums["second"] - count * outer) / jnp.maximum(count - 1, 1)
    identity = jnp.eye(mean.shape[-1])
    factor = jax.scipy.linalg.solve_triangular(
        jnp.linalg.cholesky(covariance + epsilon * identity),
        jnp.broadcast_to(identity, covariance.shape),
        lower=True,
    )
    return {"mean": mean, "factor": factor}
