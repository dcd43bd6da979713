"""Batches of a category: TFDS -> Grain -> padded uint8 arrays."""

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
from ulsad_jax.data.layouts import describe_unused
from ulsad_jax.data.prepare import RecordsBuilder, find_builder
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
    """What is known of one example's pixels, at its original resolution.

    Attributes:
        masks: one a ground-truth channel; none where none is known or needed.
        saturations: the rule that belongs to each channel.
        known: whether the defective pixels are known; of a normal image it is known
            that there are none.
    """

    masks: Bool[np.ndarray, "channels h w"]
    saturations: tuple[Saturation, ...]
    known: bool


@dataclasses.dataclass(frozen=True)
class Original(GroundTruth):
    """One example at its original resolution.

    Attributes:
        image: 8-bit RGB.
    """

    image: UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Images of a category, in a fixed order.

    Attributes:
        records: what is known of each image.
        positions: where each image is in `source`.
        source: a split as TFDS reads it, images left encoded.
        image_size: (height, width) in pixels of the images in batches.
    """

    records: list[Record]
    positions: list[int]
    source: Sequence[dict[str, Any]]
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> Int32[np.ndarray, " n"]:
        """0 for a normal image, 1 for an anomalous one."""
        return np.array([record.label for record in self.records], np.int32)

    @property
    def types(self) -> list[str]:
        """What each image shows: "good", or the kind of anomaly."""
        return [record.type for record in self.records]

    @property
    def names(self) -> list[str]:
        """Each image's "<type>/<stem>", unique within its split."""
        return [record.name for record in self.records]

    def batches(
        self, batch_size: int, own: slice = slice(None)
    ) -> Iterator[dict[str, np.ndarray]]:
        """Every example once, in order; the last batch is filled up with zeros.

        Args:
            batch_size: examples a batch.
            own: rows to read of every batch, b of them; by default all.

        Yields:
            image: uint8 [b, H, W, 3].
            label: int32 [b].
            gt_mask: bool [b, H, W], the union of the ground-truth channels.
            has_mask: bool [b], whether the defective pixels are known; of a normal
                image it is known that there are none.
            mask_lost: bool [b], whether there are defective pixels at original
                resolution, but none in `gt_mask`.
            index: int32 [b], the example's place in `records`.
            valid: bool [b], False on rows that only fill up the batch.
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
        """Example `i` as it is on disk, with its separate ground-truth channels."""
        example = self.source[self.positions[i]]
        truth = _read_ground_truth(example)
        return Original(**vars(truth), image=_decode(example["image"]))

    def ground_truth(self, i: int) -> GroundTruth:
        """As `original`, without decoding the image."""
        return _read_ground_truth(self.source[self.positions[i]])

    def _load(self, i: int) -> dict[str, Any]:
        """Example `i`; beyond the last one, one of zeros."""
        if i >= len(self):
            return {
                "image": np.zeros((*self.image_size, 3), np.uint8),
                "label": np.int32(0),
                "gt_mask": np.zeros(self.image_size, bool),
                "has_mask": np.False_,
                "mask_lost": np.False_,
                "index": np.int32(0),
                "valid": np.False_,
            }
        example = self.source[self.positions[i]]
        gt_mask, is_defective = np.zeros(self.image_size, bool), False
        for mask in map(_decode, example["masks"]["mask"]):
            gt_mask |= resize_nearest(mask, self.image_size) > 0
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
    """The three parts of a category.

    Attributes:
        train: normal images to train on.
        validation: normal images to calibrate on.
        test: normal and anomalous images; may be empty.
        fingerprint: changes whenever a source file does.
        survey: what was noticed of the files when they were prepared.
        unused: remarks on files that are not used.
    """

    train: Examples
    validation: Examples
    test: Examples
    fingerprint: str
    survey: Survey
    unused: list[str]

    @property
    def remarks(self) -> list[str]:
        """Sentences on the files that every run repeats."""
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
    white_level: float = 0.0,
    needs_training: bool = True,
) -> Category:
    """Opens a category for reading, and builds it first where that is needed.

    Where a data set has no validation split of its own, a part of the training images
    is held out.

    Args:
        name: the data set, a key of `ulsad_jax.data.layouts.LAYOUTS`.
        root: the folder that the data set was unpacked to; for "table", a CSV file.
        category: the category's name.
        image_size: (height, width) in pixels of the images in batches.
        cache_dir: where to keep what is built.
        validation_fraction: the share of the training images to hold out.
        seed: chooses the images held out, differently in each category.
        white_level: the value that means white in files of more than 8 bits a channel;
            0 where that is not given.
        needs_training: whether a category without training images is refused; else
            it is read without validation images, too.

    Raises:
        UserError: an unknown data set or category, source files that do not fit or
            cannot be read, or too few training images to hold one out.
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
    return Category(
        train=_examples(builder, train, image_size),
        validation=_examples(builder, validation, image_size),
        test=_examples(builder, parts[TEST], image_size),
        fingerprint=builder.fingerprint,
        survey=builder.read_survey(),
        unused=describe_unused(name, builder.root, category, builder.records),
    )


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves images encoded; TFDS's own class fails on a sequence of them."""

    def decode_batch_example_np(self, encoded: Any) -> Any:
        return encoded


def _examples(
    builder: RecordsBuilder, records: list[Record], image_size: tuple[int, int]
) -> Examples:
    """The examples of `records`, which are of one split."""
    if not records:
        return Examples([], [], [], image_size)
    split = records[0].split
    order = [r.name for r in builder.records if r.split == split]
    position = {name: i for i, name in enumerate(order)}
    source = builder.as_data_source(
        split, decoders={"image": _Encoded(), "masks": {"mask": _Encoded()}}
    )
    return Examples(records, [position[r.name] for r in records], source, image_size)


def _read_ground_truth(example: dict[str, Any]) -> GroundTruth:
    masks = example["masks"]
    with said_before(), Image.open(io.BytesIO(example["image"])) as image:
        width, height = image.size  # of the header
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
