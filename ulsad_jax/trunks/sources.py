"""Supplies images and features for training: kept in memory, or computed per batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from ulsad_jax.runtime import hosts
from ulsad_jax.runtime.devices import Devices, device_bytes
from ulsad_jax.trunks.features import (
    ChannelStatistics,
    channel_statistics,
    make_extractor,
)

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

    from ulsad_jax.trunks.pyramid import FeaturePyramid, Features

    Batches = Iterable[Mapping[str, np.ndarray]]

# Share of a device's memory that kept images and features may take.
DEVICE_SHARE = 0.25


class Batch(NamedTuple):
    """The images of one step and their features.

    Attributes:
        image: uint8 [b, h, w, 3].
        features: float32 [b, gh, gw, c], standardised; or raw outputs of the trunk by
            name, if the method takes levels; or None, if it takes only images.
        valid: bool [b], False in padding rows.
        index: int32 [b], the images' rows in their split; None in prediction.
    """

    image: UInt8[Array, "b h w 3"]
    features: Features | None
    valid: Bool[Array, " b"]
    index: Int[Array, " b"] | None = None


class FeatureSource(Protocol):
    """The interface through which training reads the images and features of a split."""

    def __len__(self) -> int:
        """Returns the number of images."""

    def batch(
        self, rows: Int[np.ndarray, " b"]
    ) -> tuple[UInt8[ArrayLike, "b h w 3"], Features | None]:
        """Returns the images and features of some rows."""


class _OfImages:
    """A source that has all images of its split in `images`."""

    images: np.ndarray | jax.Array

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)


@dataclasses.dataclass(frozen=True)
class Kept(_OfImages):
    """A source with images and features in host or device memory.

    Attributes:
        images: [n, h, w, 3] uint8.
        features: [n, gh, gw, c] float32, standardised; or raw outputs by name; or None.
    """

    images: np.ndarray | jax.Array
    features: Any

    def batch(
        self, rows: Int[np.ndarray, " b"]
    ) -> tuple[UInt8[ArrayLike, "b h w 3"], Features | None]:
        """Returns the images and features of some rows, in host or device memory."""
        return jax.tree.map(lambda x: x[rows], (self.images, self.features))


@dataclasses.dataclass(frozen=True)
class Streamed(_OfImages):
    """A source with images only, which runs the trunk on each batch.

    It serves features that do not fit in memory.

    Attributes:
        images: [n, h, w, 3] uint8, in host memory, as the trunk sees them.
        extractor: function from images to images and features; see `make_extractor`.
    """

    images: np.ndarray
    extractor: Callable

    def batch(
        self, rows: Int[np.ndarray, " b"]
    ) -> tuple[UInt8[ArrayLike, "b h w 3"], Features]:
        """Returns images and features, which may still be being computed."""
        return self.extractor(self.images[rows])


class Normals(NamedTuple):
    """The normal images that training and validation use.

    Attributes:
        train: training images.
        validation: normal images for validation.
        statistics: statistics of the feature channels over the training images; None
            without features.
    """

    train: FeatureSource
    validation: FeatureSource
    statistics: ChannelStatistics | None


def read(
    source: FeatureSource,
    rows: Int[np.ndarray, " b"],
    count: int,
    own: slice = slice(None),
) -> Batch:
    """Reads a batch.

    Args:
        source: source of images and features.
        rows: rows of the source, [b].
        count: number of valid rows; they come first.
        own: part of the batch to read.
    """
    valid = np.arange(len(rows)) < count
    return Batch(*source.batch(rows[own]), valid[own], rows[own].astype(np.int32))


def load(
    source: FeatureSource, rows: Int[np.ndarray, " b"], count: int, devices: Devices
) -> Batch:
    """Reads a batch and places it on the devices.

    Args:
        source: source of images and features.
        rows: rows of the source, [b]; b is a multiple of the number of devices.
        count: number of valid rows; they come first.
        devices: devices that the batch is split over.
    """
    batch = read(source, rows, count, devices.own(len(rows)))
    return jax.tree.map(devices.place, batch)


def keep(
    pyramid: FeaturePyramid | None,
    trunk: Mapping[str, Any] | None,
    batches: Sequence[Batches],
    counts: Sequence[int],
    *,
    whiten: bool,
    devices: Devices,
) -> Normals:
    """Runs the trunk once over the training and the validation images.

    Args:
        pyramid: frozen network; None to keep images only.
        trunk: variables of the network.
        batches: batches of each split, with `image`, `index` and `valid`.
        counts: number of images in each split.
        whiten: True to decorrelate the features; see `channel_statistics`.
        devices: devices that batches are split over.
    """
    extractor = pyramid and _make_raw_extractor(pyramid, trunk, devices)
    kept = [extract(extractor, *split) for split in zip(batches, counts, strict=True)]
    if pyramid is None or pyramid.levels:
        return Normals(*(Kept(*pair) for pair in kept), None)
    statistics = channel_statistics(kept[0][1], whiten=whiten)
    for _, raw in kept:  # in place: features may be most of the memory
        for image in raw:
            image[...] = statistics.standardize(image)
    return Normals(*(Kept(*pair) for pair in kept), statistics)


def stream(
    pyramid: FeaturePyramid,
    trunk: Mapping[str, Any],
    batches: Sequence[Batches],
    counts: Sequence[int],
    *,
    image_size: tuple[int, int],
    whiten: bool,
    devices: Devices,
) -> Normals:
    """Keeps images only: every batch that is read runs the trunk.

    The training images run through it once here, to compute the statistics.

    Args:
        pyramid: frozen network.
        trunk: variables of the network.
        batches: batches of each split, with `image`, `index` and `valid`.
        counts: number of images in each split.
        image_size: (height, width) in pixels of the images that the trunk sees.
        whiten: True to decorrelate the features; see `channel_statistics`.
        devices: devices that batches are split over.
    """
    raw_extractor = _make_raw_extractor(pyramid, trunk, devices)
    train, validation = (
        np.empty((count, *image_size, 3), np.uint8) for count in counts
    )

    def run_trunk() -> Iterator[Float[np.ndarray, "h w c"]]:
        for batch in batches[0]:
            _put(train, batch, batch["image"])
            yield from raw_extractor(batch["image"])[1][batch["valid"]]

    if pyramid.levels:
        statistics = None
        for batch in batches[0]:
            _put(train, batch, batch["image"])
    else:
        statistics = channel_statistics(run_trunk(), whiten=whiten)
    for batch in batches[1]:
        _put(validation, batch, batch["image"])
    extractor = make_extractor(pyramid, trunk, statistics, devices.replicate)

    def extract_own(
        images: UInt8[np.ndarray, "b h w 3"],
    ) -> tuple[UInt8[Array, "b height width 3"], Features]:
        return extractor(devices.place(images))

    return Normals(
        Streamed(train, extract_own), Streamed(validation, extract_own), statistics
    )


def place(normals: Normals, devices: Devices) -> Normals:
    """Copies kept images and features to every device, if they fit.

    They may take a share of `DEVICE_SHARE` of a device's memory. From host memory a
    batch takes longer to arrive than a fast device takes for a training step. On CPUs,
    and with several processes, everything stays where it is.
    """
    kept = normals.train, normals.validation
    if jax.process_count() > 1 or not all(isinstance(k, Kept) for k in kept):
        return normals
    arrays = [(k.images, k.features) for k in kept]
    needed = sum(x.nbytes for x in jax.tree.leaves(arrays))
    if needed > DEVICE_SHARE * device_bytes():
        return normals
    placed = (Kept(*devices.replicate(pair)) for pair in arrays)
    return Normals(*placed, normals.statistics)


def extract(
    extractor: Callable | None, batches: Batches, count: int
) -> tuple[UInt8[np.ndarray, "n h w 3"], Any]:
    """Reads a split, and runs the trunk once over it.

    Args:
        extractor: function from images to images and features, see `make_extractor`;
            None for images only.
        batches: batches with `image`, `index` and `valid`.
        count: number of images in the split.

    Returns:
        The method's images, and raw features or None, both in the split's order.
    """
    kept = None
    for batch in batches:
        new = extractor(batch["image"]) if extractor else (batch["image"], None)
        if kept is None:
            kept = jax.tree.map(lambda x: np.empty((count, *x.shape[1:]), x.dtype), new)
        for target, values in zip(*map(jax.tree.leaves, (kept, new)), strict=True):
            _put(target, batch, np.asarray(values))
    return kept


def count_bytes(count: int, image_size: tuple[int, int], features: Any) -> int:
    """Returns the number of bytes that `Kept` takes.

    Args:
        count: number of images.
        image_size: (height, width) in pixels of the images beside the features.
        features: shapes of one image's features, see `pyramid.feature_shapes`; or None.
    """
    floats = sum(math.prod(shape.shape) for shape in jax.tree.leaves(features))
    return count * (4 * floats + 3 * math.prod(image_size))


def _put(
    target: Shaped[np.ndarray, "n ..."],
    batch: Mapping[str, np.ndarray],
    values: Shaped[np.ndarray, "b ..."],
) -> None:
    """Writes a batch's values, except padding rows, to their rows of `target`."""
    target[batch["index"][batch["valid"]]] = values[batch["valid"]]


def _make_raw_extractor(
    pyramid: FeaturePyramid, trunk: Mapping[str, Any], devices: Devices
) -> Callable[
    [UInt8[np.ndarray, "b h w 3"]],
    tuple[UInt8[np.ndarray, "b height width 3"], Features],
]:
    extractor = make_extractor(pyramid, trunk, put=devices.replicate)
    return lambda image: hosts.gather(extractor(devices.split(image)))
