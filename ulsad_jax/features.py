"""Features of a split, computed once, and their channel statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import numpy as np

from ulsad_jax.models.pyramid import FeaturePyramid

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt8

# A channel whose variance is below this share of its mean square never changes.
DEAD_CHANNEL = 1e-12


@dataclasses.dataclass(frozen=True)
class Kept:
    """What training needs of every image of a split, in host memory.

    Attributes:
        features: standardised, [n, h/8, w/8, c] float32.
        images: [n, h, w, 3] uint8.
    """

    features: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.images)

    def batch(
        self, rows: Int[np.ndarray, " b"]
    ) -> tuple[Float[np.ndarray, "b h/8 w/8 c"], UInt8[np.ndarray, "b h w 3"]]:
        """Features and images of some rows."""
        return self.features[rows], self.images[rows]


@flax.struct.dataclass
class ChannelStatistics:
    """Mean and deviation of every feature channel over the training images, [c]."""

    mean: jax.Array
    std: jax.Array

    def standardize(self, features: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Returns (features - mean) / std."""
        return (features - self.mean) / self.std


def make_extractor(pyramid: FeaturePyramid, trunk: Mapping[str, Any]):
    """A jitted function from images [b, h, w, 3] to raw features."""
    variables = {kind: {"trunk": tree} for kind, tree in trunk.items()}
    apply = jax.jit(pyramid.apply)
    return lambda image: apply(variables, image)


def extract(
    extractor, batches: Iterable[Mapping[str, np.ndarray]], count: int
) -> tuple[Float[np.ndarray, "n h w c"], UInt8[np.ndarray, "n h w 3"]]:
    """Runs the trunk once over a split.

    Args:
        extractor: see `make_extractor`.
        batches: with `image`, `index` and `valid`.
        count: images in the split.

    Returns:
        Raw features and images, both in the split's order.
    """
    features = images = None
    for batch in batches:
        new = np.asarray(extractor(batch["image"]))
        if features is None:
            features = np.empty((count, *new.shape[1:]), np.float32)
            images = np.empty((count, *batch["image"].shape[1:]), np.uint8)
        rows = batch["index"][batch["valid"]]
        features[rows] = new[batch["valid"]]
        images[rows] = batch["image"][batch["valid"]]
    return features, images


def channel_statistics(features: Float[np.ndarray, "n h w c"]) -> ChannelStatistics:
    """Statistics over every position of every image, with sums in float64.

    std = sqrt(E[y^2] - E[y]^2), as in the reference; a channel that never changes
    gets 1, so that it standardises to 0 and not to NaN.
    """
    channels = features.shape[-1]
    total, squares = np.zeros(channels), np.zeros(channels)
    for image in features.reshape(len(features), -1, channels):
        image = image.astype(np.float64)
        total += image.sum(0)
        squares += np.square(image).sum(0)
    count = features.size / channels
    mean, mean_square = total / count, squares / count
    variance = mean_square - np.square(mean)
    dead = variance <= DEAD_CHANNEL * mean_square
    std = np.sqrt(np.where(dead, 1.0, variance))
    return ChannelStatistics(mean.astype(np.float32), std.astype(np.float32))
