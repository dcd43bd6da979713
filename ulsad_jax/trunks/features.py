"""Features of a split, kept or computed for each batch, and channel statistics."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import flax.struct
import jax
import numpy as np

from ulsad_jax.runtime import hosts
from ulsad_jax.trunks.pyramid import FeaturePyramid, feature_shape

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int, Shaped, UInt8

    from ulsad_jax.runtime.devices import Devices

# A channel whose variance is below this share of its mean square never changes.
DEAD_CHANNEL = 1e-12
# Directions in which scaled features vary less than this are whitened as if by this;
# the variances of all directions are 1 on average.
LEAST_VARIANCE = 0.01
# Of a device's memory, what features may take there: networks need some, too.
DEVICE_SHARE = 0.25


class FeatureSource(Protocol):
    """What training needs of every image of a split, wherever it comes from."""

    def __len__(self) -> int:
        """How many images there are."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(h/8, w/8, c) of an image's features."""

    def batch(
        self, rows: Int[np.ndarray, " b"]
    ) -> tuple[Float[ArrayLike, "b h/8 w/8 c"], UInt8[ArrayLike, "b h w 3"]]:
        """Standardised features and images of some rows."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Features and images in host or device memory.

    Attributes:
        features: standardised, [n, h/8, w/8, c] float32.
        images: [n, h, w, 3] uint8.
    """

    features: np.ndarray | jax.Array
    images: np.ndarray | jax.Array

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.images)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        return self.images.shape[1:3]

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(h/8, w/8, c) of an image's features."""
        return self.features.shape[1:]

    def batch(
        self, rows: Int[np.ndarray, " b"]
    ) -> tuple[Float[ArrayLike, "b h/8 w/8 c"], UInt8[ArrayLike, "b h w 3"]]:
        """Features and images of some rows, from where they are."""
        return self.features[rows], self.images[rows]


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Images, where features do not fit in memory: each batch runs the trunk.

    Attributes:
        images: [n, h, w, 3] uint8, in host memory.
        extractor: from images to standardised features, see `make_extractor`.
    """

    images: np.ndarray
    extractor: Callable

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.images)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        return self.images.shape[1:3]

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(h/8, w/8, c) of an image's features."""
        return feature_shape(self.image_size)

    def batch(
        self, rows: Int[np.ndarray, " b"]
    ) -> tuple[Float[Array, "b h/8 w/8 c"], UInt8[np.ndarray, "b h w 3"]]:
        """Features and images of some rows; the features may still be on their way."""
        images = self.images[rows]
        return self.extractor(images), images


@flax.struct.dataclass
class ChannelStatistics:
    """Of the feature channels over the training images.

    Attributes:
        mean: [c].
        std: [c].
        whitening: [c, c], decorrelates scaled channels; None where they stay as they
            are.
    """

    mean: jax.Array
    std: jax.Array
    whitening: jax.Array | None = None

    def standardize(self, features: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Returns (features - mean) / std, whitened where that is asked for."""
        scaled = (features - self.mean) / self.std
        if self.whitening is None:
            return scaled
        # Accelerators would round more coarsely, and whitening would enlarge it.
        with jax.default_matmul_precision("float32"):
            return scaled @ self.whitening


class Normals(NamedTuple):
    """What training and validation work on.

    Attributes:
        train: the training images.
        validation: the validation normals.
        statistics: of the feature channels over the training images.
    """

    train: FeatureSource
    validation: FeatureSource
    statistics: ChannelStatistics


def make_extractor(
    pyramid: FeaturePyramid,
    trunk: Mapping[str, Any],
    statistics: ChannelStatistics | None = None,
    devices: Devices | None = None,
) -> Callable[[UInt8[Array, "b h w 3"]], Float[Array, "b h/8 w/8 c"]]:
    """A jitted function from images to features.

    Args:
        pyramid: the frozen network.
        trunk: its variables.
        statistics: to standardise features with; without them they are raw.
        devices: that have the images; by default one does.
    """
    put = jax.device_put if devices is None else devices.replicate
    trunk, statistics = put((trunk, statistics))

    @jax.jit
    def apply(trunk, statistics, image):
        raw = pyramid.apply(trunk, image)
        return raw if statistics is None else statistics.standardize(raw)

    return lambda image: apply(trunk, statistics, image)


def keep(
    pyramid: FeaturePyramid,
    trunk: Mapping[str, Any],
    batches: Sequence[Iterable[Mapping[str, np.ndarray]]],
    counts: Sequence[int],
    *,
    whiten: bool,
    devices: Devices,
) -> Normals:
    """Runs the trunk once over the training and the validation images.

    Args:
        pyramid: the frozen network.
        trunk: its variables.
        batches: of each split, with `image`, `index` and `valid`.
        counts: images in each.
        whiten: see `channel_statistics`.
        devices: to split batches over.
    """
    extractor = _make_raw_extractor(pyramid, trunk, devices)
    kept = [extract(extractor, *split) for split in zip(batches, counts, strict=True)]
    statistics = channel_statistics(kept[0][0], whiten=whiten)
    for raw, _ in kept:  # in place: features may be most of the memory
        for image in raw:
            image[...] = statistics.standardize(image)
    return Normals(*(Kept(*pair) for pair in kept), statistics)


def stream(
    pyramid: FeaturePyramid,
    trunk: Mapping[str, Any],
    batches: Sequence[Iterable[Mapping[str, np.ndarray]]],
    counts: Sequence[int],
    *,
    image_size: tuple[int, int],
    whiten: bool,
    devices: Devices,
) -> Normals:
    """As `keep`, but keeps images alone: every batch asked for runs the trunk.

    The training images run through it here once, for the statistics.

    Args:
        pyramid: the frozen network.
        trunk: its variables.
        batches: of each split, with `image`, `index` and `valid`.
        counts: images in each.
        image_size: (height, width) of the images.
        whiten: see `channel_statistics`.
        devices: to split batches over.
    """
    raw_extractor = _make_raw_extractor(pyramid, trunk, devices)
    train, validation = (
        np.empty((count, *image_size, 3), np.uint8) for count in counts
    )

    def run_trunk() -> Iterator[Float[np.ndarray, "h w c"]]:
        for batch in batches[0]:
            _put(train, batch, batch["image"])
            yield from raw_extractor(batch["image"])[batch["valid"]]

    statistics = channel_statistics(run_trunk(), whiten=whiten)
    for batch in batches[1]:
        _put(validation, batch, batch["image"])
    extractor = make_extractor(pyramid, trunk, statistics, devices)

    def extract_own(images: UInt8[np.ndarray, "b h w 3"]) -> Float[Array, "b h w c"]:
        return extractor(devices.place(images))

    return Normals(
        Streamed(train, extract_own), Streamed(validation, extract_own), statistics
    )


def place(normals: Normals, devices: Devices) -> Normals:
    """Moves what is kept into the memory of every device, if it is little of that.

    From host memory a batch takes longer to arrive than a fast device takes for a
    training step. On CPUs, and with several processes, everything stays where it is.
    """
    kept = normals.train, normals.validation
    if jax.process_count() > 1 or not all(isinstance(k, Kept) for k in kept):
        return normals
    needed = sum(k.features.nbytes + k.images.nbytes for k in kept)
    if needed > DEVICE_SHARE * device_bytes():
        return normals
    placed = (Kept(*devices.replicate((k.features, k.images))) for k in kept)
    return Normals(*placed, normals.statistics)


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
        _put(features, batch, new)
        _put(images, batch, batch["image"])
    return features, images


def channel_statistics(
    features: Iterable[Float[np.ndarray, "h w c"]], *, whiten: bool = False
) -> ChannelStatistics:
    """Statistics over every position of every image, with sums in float64.

    std = sqrt(E[y^2] - E[y]^2), as in the reference; a channel that never changes
    gets 1, so that it standardises to 0 and not to NaN.

    Args:
        features: raw, of one image after the other; at least one.
        whiten: whether to decorrelate the scaled channels, too, by the inverse square
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


def count_bytes(count: int, image_size: tuple[int, int]) -> int:
    """What `Kept` takes for so many images of (height, width) pixels."""
    floats = math.prod(feature_shape(image_size))
    return count * (4 * floats + 3 * math.prod(image_size))


def host_bytes() -> int:
    """The machine's memory, or what a container may have; of all hosts the least."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    own = total if text == "max" else min(total, int(text))
    least = hosts.gather(np.int32([own // 2**20])).min()  # so that all decide alike
    return int(least) * 2**20


def device_bytes() -> int:
    """A device's memory; 0 where that is the host's, as on CPUs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 0)


def _put(
    target: Shaped[np.ndarray, "n ..."],
    batch: Mapping[str, np.ndarray],
    values: Shaped[np.ndarray, "b ..."],
) -> None:
    """Puts a batch's values, but those that only fill it up, where they belong."""
    target[batch["index"][batch["valid"]]] = values[batch["valid"]]


def _make_raw_extractor(
    pyramid: FeaturePyramid, trunk: Mapping[str, Any], devices: Devices
) -> Callable[[UInt8[np.ndarray, "b h w 3"]], Float[np.ndarray, "b h/8 w/8 c"]]:
    extractor = make_extractor(pyramid, trunk, devices=devices)
    return lambda image: hosts.gather(extractor(devices.split(image)))
