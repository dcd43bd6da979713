"""Batches of a category's examples, read from TFDS with Grain."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ulsad_jax.data.file_warnings import said_before
from ulsad_jax.data.layouts import describe_unused, find
from ulsad_jax.data.prepare import RecordsBuilder, damage_errors, find_builder
from ulsad_jax.data.records import (
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    Record,
    Saturation,
    hold_out,
    no_images,
)
from ulsad_jax.data.resize import resize_bilinear, resize_nearest
from ulsad_jax.data.survey import Survey

if TYPE_CHECKING:
    from jaxtyping import Bool, Int32, UInt8

# Threads, not processes: decoding images releases the interpreter's lock.
READING = grain.ReadOptions(num_threads=16, prefetch_buffer_size=64)


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """The ground truth of one example at its original resolution.

    Attributes:
        masks: ground-truth channels, bool [channels, h, w]; no channel if none is known
            or needed.
        saturations: saturation rule of each channel.
        known: True if the defective pixels are known. Always True for a normal image,
            which has none.
    """

    masks: Bool[np.ndarray, "channels h w"]
    saturations: tuple[Saturation, ...]
    known: bool


@dataclasses.dataclass(frozen=True)
class Original(GroundTruth):
    """One example at its original resolution.

    Attributes:
        image: RGB image, uint8 [h, w, 3].
    """

    image: UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples of a category in a fixed order.

    Attributes:
        records: one record per example.
        positions: index of each example in `source`.
        source: TFDS data source of one split, with images left encoded.
        image_size: (height, width) of the images in batches, in pixels.
        mask_size: (height, width) of the masks in batches, in pixels.
    """

    records: list[Record]
    positions: list[int]
    source: Sequence[dict[str, Any]]
    image_size: tuple[int, int]
    mask_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> Int32[np.ndarray, " n"]:
        """Labels, int32 [n]: 0 for a normal image, 1 for an anomalous one."""
        return np.array([record.label for record in self.records], np.int32)

    @property
    def types(self) -> list[str]:
        """Type of each image: "good" or the kind of anomaly."""
        return [record.type for record in self.records]

    @property
    def names(self) -> list[str]:
        """Name of each image, "<type>/<stem>", unique within its split."""
        return [record.name for record in self.records]

    def batches(
        self, batch_size: int, own: slice = slice(None)
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields every example once, in order, in batches of equal size.

        The last batch is padded with zeros.

        Args:
            batch_size: number of examples in a batch.
            own: slice of the rows to read of each batch, b rows; all rows by default.

        Yields:
            image: uint8 [b, H, W, 3].
            label: int32 [b]; 0 for normal, 1 for anomalous.
            gt_mask: bool [b, h, w]; union of the ground-truth channels.
            has_mask: bool [b]; True if the defective pixels are known. Always True for
                a normal image, which has none.
            mask_lost: bool [b]; True if there are defective pixels at the original
                resolution but none in `gt_mask`.
            index: int32 [b]; position of the example in `records`.
            valid: bool [b]; False for rows that only pad the batch.
        """
        if not len(self):
            return
        count = -(-len(self) // batch_size) * batch_size
        wanted = np.arange(count).reshape(-1, batch_size)[:, own]
        dataset = (
            grain.MapDataset.source(wanted.ravel())
            .map(self._load)
            .to_iter_dataset(READING)
            .batch(wanted.shape[1], batch_fn=_stack)
        )
        with contextlib.closing(iter(dataset)) as batches:
            yield from batches

    def original(self, i: int) -> Original:
        """Returns example `i` at its original resolution, with its ground truth."""
        example = self.source[self.positions[i]]
        truth = _read_ground_truth(example)
        return Original(**vars(truth), image=_decode(example["image"]))

    def ground_truth(self, i: int) -> GroundTruth:
        """Returns the ground truth of example `i` without decoding its image."""
        return _read_ground_truth(self.source[self.positions[i]])

    def _load(self, i: int) -> dict[str, Any]:
        """Returns example `i`, resized; zeros if `i` is past the last example."""
        if i >= len(self):
            return {
                "image": np.zeros((*self.image_size, 3), np.uint8),
                "label": np.int32(0),
                "gt_mask": np.zeros(self.mask_size, bool),
                "has_mask": np.False_,
                "mask_lost": np.False_,
                "index": np.int32(0),
                "valid": np.False_,
            }
        example = self.source[self.positions[i]]
        gt_mask, is_defective = np.zeros(self.mask_size, bool), False
        for mask in map(_decode, example["masks"]["mask"]):
            gt_mask |= resize_nearest(mask, self.mask_size) > 0
            is_defective |= bool(mask.any())
        return {
            "image": resize_bilinear(_decode(example["image"]), self.image_size),
            "label": np.int32(example["label"]),
            "gt_mask": gt_mask,
            "has_mask": np.bool_(example["has_mask"]),
            "mask_lost": np.bool_(is_defective and not gt_mask.any()),
            "index": np.int32(i),
            "valid": np.True_,
        }


@dataclasses.dataclass(frozen=True)
class Category:
    """The training, validation and test examples of a category.

    Attributes:
        train: normal images used for training.
        validation: normal images used for calibration.
        test: normal and anomalous images; may be empty.
        fingerprint: string that changes when a source file or the white level changes.
        survey: survey of the files, taken when they were prepared.
        has_saturation: True if ground-truth channels have saturation thresholds; see
            `layouts.base.Layout`.
        unused: remarks on files that are not used, one sentence each.
    """

    train: Examples
    validation: Examples
    test: Examples
    fingerprint: str
    survey: Survey
    has_saturation: bool
    unused: list[str]

    @property
    def remarks(self) -> list[str]:
        """Remarks on the files that every run repeats, one sentence each."""
        return [*self.unused, *self.survey.remarks]


def open_category(
    name: str,
    *,
    root: str | os.PathLike[str],
    category: str,
    image_size: tuple[int, int],
    cache_dir: str | os.PathLike[str],
    validation_fraction: float,
    seed: int,
    mask_size: tuple[int, int] | None = None,
    white_level: float = 0.0,
    needs_training: bool = True,
) -> Category:
    """Opens a category for reading, and builds it first if needed.

    If a data set has no validation split of its own, part of the training images is
    held out.

    Args:
        name: name of a built-in layout, or "module:attribute".
        root: folder to which the data set was unpacked; for "table", a CSV file.
        category: name of the category.
        image_size: (height, width) of the images in batches, in pixels.
        cache_dir: folder in which the built data are kept.
        validation_fraction: fraction of the training images to hold out.
        seed: seed that selects the held-out images, differently in each category.
        mask_size: size of the masks, by default `image_size`.
        white_level: value that means white in files with more than 8 bits per channel;
            0 if it is not given.
        needs_training: True to refuse a category without training images. If False,
            such a category is read, without validation images, too.

    Raises:
        UserError: the data set or category is unknown, source files do not fit or
            cannot be read, or there are too few training images to hold one out.
    """
    builder = find_builder(name)(
        root=root, config=category, data_dir=cache_dir, white_level=white_level
    )
    parts = {s: [r for r in builder.records if r.split == s] for s in SPLITS}
    train, validation = parts[TRAIN], parts[VALIDATION]
    if needs_training and not train:
        raise no_images("normal training images", builder.root)
    builder.download_and_prepare()
    if not train:
        validation = []
    elif not validation:
        train, validation = hold_out(
            train, fraction=validation_fraction, seed=_mix_seed(seed, category)
        )
    sizes = image_size, mask_size or image_size
    return Category(
        train=_examples(builder, train, sizes),
        validation=_examples(builder, validation, sizes),
        test=_examples(builder, parts[TEST], sizes),
        fingerprint=builder.fingerprint,
        survey=builder.read_survey(),
        has_saturation=find(name).has_saturation,
        unused=describe_unused(name, builder.root, category, builder.records),
    )


class _Encoded(tfds.decode.SkipDecoding):
    """A decoder that leaves images encoded.

    TFDS's own class fails on a sequence of images.
    """

    def decode_batch_example_np(self, encoded: Any) -> Any:
        return encoded


def _examples(
    builder: RecordsBuilder, records: list[Record], sizes: tuple[tuple[int, int], ...]
) -> Examples:
    """Returns the examples of `records`, which all belong to one split.

    Args:
        builder: builder of the category.
        records: records of the examples.
        sizes: sizes of images and of masks, see `Examples`.
    """
    if not records:
        return Examples([], [], [], *sizes)
    split = records[0].split
    order = [r.name for r in builder.records if r.split == split]
    position = {name: i for i, name in enumerate(order)}
    source = builder.as_data_source(
        split, decoders={"image": _Encoded(), "masks": {"mask": _Encoded()}}
    )
    positions = [position[r.name] for r in records]
    return Examples(records, positions, _Split(source, builder.data_dir), *sizes)


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split as TFDS reads it; damage is an error that names the folder."""

    source: Sequence[dict[str, Any]]
    folder: str | os.PathLike[str]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        with damage_errors(self.folder):
            return self.source[i]


def _read_ground_truth(example: dict[str, Any]) -> GroundTruth:
    masks = example["masks"]
    with said_before(), Image.open(io.BytesIO(example["image"])) as image:
        width, height = image.size  # from the header
    decoded = np.zeros((len(masks["mask"]), height, width), bool)
    for mask, target in zip(masks["mask"], decoded, strict=True):
        np.greater(_decode(mask), 0, out=target)
    saturations = zip(
        masks["defect_name"],
        masks["saturation_threshold"],
        masks["relative_saturation"],
        strict=True,
    )
    return GroundTruth(
        decoded,
        tuple(Saturation(n.decode(), float(t), bool(r)) for n, t, r in saturations),
        bool(example["has_mask"]),
    )


def _mix_seed(seed: int, category: str) -> int:
    sequence = np.random.SeedSequence([seed, zlib.crc32(category.encode())])
    return int(sequence.generate_state(1)[0])


def _decode(data: bytes) -> UInt8[np.ndarray, "h w *c"]:
    with said_before(), Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {key: np.stack([e[key] for e in examples]) for key in examples[0]}
