"""Implements DFR: an autoencoder reconstructs the features of every region.

Shi, Yang & Qi, "Unsupervised Anomaly Segmentation via Deep Feature Reconstruction",
Neurocomputing 2021, arXiv 2012.07122.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from ulsad_jax.methods import descent
from ulsad_jax.methods.base import (
    LEVELS,
    TOTAL,
    Batch,
    Method,
    Spec,
    State,
    count_bytes,
)
from ulsad_jax.nn.layers import BatchNorm, Conv, multiply, resize, resize_matrix
from ulsad_jax.runtime.rules import POSITIVE, SHARE, Rule, at_least

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

REGION = 4  # pixels along the sides of a region, which do not overlap


class Autoencoder(nn.Module):
    """Autoencoder of 1 x 1 convolutions: every position is reconstructed by itself.

    Attributes:
        latent: number of channels of the code.
        dtype: computation type.
        axis_name: name of the `jax.pmap` axis, see `BatchNorm`.
    """

    latent: int
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w c"]:
        """Reconstructs `x`."""
        d, channels = self.latent, x.shape[-1]
        wide = (channels + 2 * d) // 2
        for i, out in enumerate((wide, 2 * d, d, 2 * d, wide, channels), start=1):
            x = Conv(out, (1, 1), dtype=self.dtype, name=f"conv{i}")(x)
            if i not in (3, 6):  # the code, and the reconstruction
                x = BatchNorm(axis_name=self.axis_name, name=f"bn{i}")(x, train=train)
                x = nn.relu(x)
        return x.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Dfr(Method):
    """DFR; the map is the mean squared error of the reconstruction.

    Attributes:
        latent: number of channels of the code; 0 for the number of principal components
            that hold the share `variance` of the variance.
        variance: that share, over the first batch of training images.
        learning_rate: Adam's.
    """

    takes: ClassVar[str] = LEVELS
    published_epochs: ClassVar[float | None] = 700
    rules: ClassVar[Mapping[str, Rule]] = {
        "methods.dfr.latent": at_least(0),
        "methods.dfr.variance": SHARE,
        "methods.dfr.learning_rate": POSITIVE,
    }

    latent: int = 0
    variance: float = 0.9
    learning_rate: float = 1e-4

    def adapt(self, batch: Batch) -> Dfr:
        """Chooses the size of the code, unless it is given."""
        if self.latent:
            return self
        x = np.asarray(describe_regions(batch), np.float64)[batch.valid]
        found = count_components(x.reshape(-1, x.shape[-1]), self.variance)
        return dataclasses.replace(self, latent=found)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Draws the initial weights and initialises Adam."""
        regions, network = self._describe(spec)
        return descent.init(network, self._make_optimizer(), key, regions, train=True)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Takes one step of Adam on the mean squared error."""
        del key
        x, network = describe_regions(batch), self._read_network(state.model)

        def loss_fn(y):
            return jnp.square(x - y).mean(), {}

        optimizer = self._make_optimizer()
        return descent.step(
            network, optimizer, loss_fn, state, self.axis_name, x, train=True
        )

    def losses(
        self, model: Any, batch: Batch, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Returns the mean squared error, in inference mode."""
        del step
        valid = batch.valid[:, None, None]
        return {TOTAL: self._errors(model, batch).mean(where=valid)}

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the map `regions`: the mean squared error of each region."""
        errors = self._errors(model, batch)[..., None]
        return {"regions": resize(errors, batch.image.shape[1:3], aligned=True)[..., 0]}

    def estimate_bytes(self, spec: Spec) -> int:
        """Estimates the device memory of a step, see `descent.estimate_bytes`."""
        regions, network = self._describe(spec)
        step = descent.estimate_bytes(network, regions, train=True)
        return step + 2 * count_bytes(spec.batch)

    def _describe(self, spec: Spec) -> tuple[jax.ShapeDtypeStruct, Autoencoder]:
        """Returns the shape of the regions' features, and the network.

        Until `adapt` is called, the code is taken to have half of the channels.
        """
        regions = jax.eval_shape(describe_regions, spec.batch)
        return regions, self._make_network(self.latent or regions.shape[-1] // 2)

    def _read_network(self, model: Any) -> Autoencoder:
        """Returns the network that a model belongs to, whatever `latent` is."""
        return self._make_network(model["params"]["conv3"]["bias"].size)

    def _make_network(self, latent: int) -> Autoencoder:
        return Autoencoder(latent, jnp.dtype(self.dtype), self.axis_name)

    def _errors(self, model: Any, batch: Batch) -> Float[Array, "b gh gw"]:
        """Returns the mean squared error of each region, in inference mode."""
        x = describe_regions(batch)
        y = self._read_network(model).apply(model, x, train=False)
        return jnp.square(x - y).mean(-1)

    def _make_optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)


METHODS = {"dfr": Dfr}


def describe_regions(batch: Batch) -> Float[Array, "b h/4 w/4 c"]:
    """Returns the features of all regions: every level's mean over the region.

    Levels are resized to the images' size first, as with PyTorch's
    `align_corners=True`, and concatenated in the order of their names.
    """
    levels = []
    for _, x in sorted(batch.features.items()):
        for axis in (1, 2):
            n_in, n_out = x.shape[axis], batch.image.shape[axis]
            pixels = resize_matrix(n_in, n_out, aligned=True)
            x = multiply(pixels.reshape(-1, REGION, n_in).mean(1), x, axis)
        levels.append(x)
    return jnp.concatenate(levels, axis=-1)


def count_components(x: Float[np.ndarray, "n c"], share: float) -> int:
    """Returns how many principal components have more than a share of the variance.

    Args:
        x: samples; if they are all the same, the number is 1.
        share: share of the variance, between 0 and 1.
    """
    variances = np.maximum(np.linalg.eigvalsh(np.cov(x.T, ddof=0)), 0)[::-1]
    return 1 + int(np.argmax(np.cumsum(variances) > share * variances.sum()))
