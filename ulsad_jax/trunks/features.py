"""Computes features of images, and statistics of their channels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.nn.layers import resize

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, UInt8

    from ulsad_jax.trunks.pyramid import FeaturePyramid, Features

# A channel whose variance is below this share of its mean square never changes.
DEAD_CHANNEL = 1e-12
# The least variance of scaled features that whitening assumes for a direction; the
# variances of all directions are 1 on average.
LEAST_VARIANCE = 0.01


@flax.struct.dataclass
class ChannelStatistics:
    """Statistics of the feature channels over the training images.

    Attributes:
        mean: [c] float32.
        std: [c] float32.
        whitening: [c, c] float32 matrix that decorrelates scaled channels; None for no
            whitening.
    """

    mean: jax.Array
    std: jax.Array
    whitening: jax.Array | None = None

    def standardize(self, features: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Returns (features - mean) / std, multiplied by `whitening` unless None."""
        scaled = (features - self.mean) / self.std
        if self.whitening is None:
            return scaled
        # Accelerators round more coarsely, and whitening amplifies the errors.
        with jax.default_matmul_precision("float32"):
            return scaled @ self.whitening


def apply(
    pyramid: FeaturePyramid,
    trunk: Mapping[str, Any],
    image: UInt8[Array, "b h w 3"],
    statistics: ChannelStatistics | None = None,
) -> Features:
    """Returns the features of images, as a pure function.

    Args:
        pyramid: frozen network.
        trunk: variables of the network.
        image: batch of images.
        statistics: channel statistics that standardise the features; None for raw
            features.
    """
    raw = pyramid.apply(trunk, image)
    return raw if statistics is None else statistics.standardize(raw)


def resize_images(
    pyramid: FeaturePyramid, image: UInt8[ArrayLike, "b h w 3"]
) -> UInt8[ArrayLike, "b height width 3"]:
    """Returns the images that a method gets beside the features.

    They are resized bilinearly, without antialiasing, and rounded to the nearest grey
    level.

    Args:
        pyramid: network whose `image_size` they have; with None, they are not resized.
        image: batch of images that the trunk sees.
    """
    if pyramid.image_size in (None, image.shape[1:3]):
        return image
    return _resize(image, pyramid.image_size)


def make_extractor(
    pyramid: FeaturePyramid,
    trunk: Mapping[str, Any],
    statistics: ChannelStatistics | None = None,
    put: Callable[[Any], Any] = jax.device_put,
) -> Callable[[UInt8[ArrayLike, "b h w 3"]], tuple[UInt8[ArrayLike, "..."], Features]]:
    """Returns a function from images to those that a method gets, and their features.

    Args:
        pyramid: frozen network.
        trunk: variables of the network.
        statistics: channel statistics that standardise the features; None for raw
            features.
        put: function that places a tree of arrays on the devices of the images; by
            default on the first device.
    """
    placed = put((trunk, statistics))
    run = _jit(pyramid)
    return lambda image: (resize_images(pyramid, image), run(*placed, image))


def channel_statistics(
    features: Iterable[Float[np.ndarray, "h w c"]], *, whiten: bool = False
) -> ChannelStatistics:
    """Computes statistics over every position of every image, with sums in float64.

    std = sqrt(E[y^2] - E[y]^2), as in the reference. A channel that never changes gets
    std 1, so that it standardises to 0 and not to NaN.

    Args:
        features: raw features [h, w, c] of each image; at least one image.
        whiten: True to decorrelate the scaled channels as well, by the inverse square
            root of their correlations (ZCA-cor whitening, Kessy et al., "Optimal
            Whitening and Decorrelation", The American Statistician 2018).
    """
    count, total, squares, products = 0, 0.0, 0.0, 0.0
    for image in features:
        flat = image.reshape(-1, image.shape[-1]).astype(np.float64)
        count += len(flat)
        total += flat.sum(0)
        squares += np.square(flat).sum(0)
        if whiten:
            products += flat.T @ flat
    mean, mean_square = total / count, squares / count
    variance = mean_square - np.square(mean)
    dead = variance <= DEAD_CHANNEL * mean_square
    std = np.sqrt(np.where(dead, 1.0, variance))
    statistics = ChannelStatistics(mean.astype(np.float32), std.astype(np.float32))
    if not whiten:
        return statistics
    covariance = products / count - np.outer(mean, mean)
    variances, directions = np.linalg.eigh(covariance / np.outer(std, std))
    scales = np.maximum(variances, LEAST_VARIANCE) ** -0.5
    whitening = (directions * scales) @ directions.T
    return statistics.replace(whitening=whitening.astype(np.float32))


@functools.partial(jax.jit, static_argnums=1)
def _resize(
    image: UInt8[Array, "b h w 3"], size: tuple[int, int]
) -> UInt8[Array, "b height width 3"]:
    return jnp.rint(resize(image.astype(jnp.float32), size)).astype(jnp.uint8)


@functools.lru_cache
def _jit(pyramid: FeaturePyramid) -> Callable[..., Features]:
    """Returns a jitted `apply`, which is compiled once for equal networks."""

    @jax.jit
    def run(trunk, statistics, image):
        return apply(pyramid, trunk, image, statistics)

    return run
