"""The data sets that a trunk is judged on, in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from types import ModuleType

    from jaxtyping import Bool, UInt8

GOOD = "good"
SCENES_FIRST_SEED, SCENES = 1000, 3  # categories of drawn scenes a seed


class Counts(NamedTuple):
    """Images a category.

    Attributes:
        train: normal, to train on.
        validation: normal, to calibrate ULSAD on.
        good: normal test images.
        anomalous: test images of each type of drawn defects; scenes have three times
            as many of each of their two types.
        tiles: of magnetic tiles, at most twice as many are trained on, and at most
            so many of each type are tested; 0 takes all.
    """

    train: int
    validation: int
    good: int
    anomalous: int
    tiles: int


class Category(NamedTuple):
    """Images of a category.

    Attributes:
        name: for the report.
        train: normal.
        validation: normal.
        test: images of `types`.
        types: what each test image shows.
        masks: defective pixels of the test images.
        has_mask: whether they are known.
    """

    name: str
    train: UInt8[np.ndarray, "n h w 3"]
    validation: UInt8[np.ndarray, "v h w 3"]
    test: UInt8[np.ndarray, "m h w 3"]
    types: list[str]
    masks: Bool[np.ndarray, "m h w"]
    has_mask: Bool[np.ndarray, " m"]


def open_drawn(
    source: ModuleType, seed: int, size: int, counts: Counts
) -> Iterator[Category]:
    """Every category of `source`: `photo_defects` or `surface_defects`."""
    for name in source.CATEGORIES:

        def draw(split: str, type: str, i: int, name=name):
            return source.draw_sample(
                name, seed=seed, split=split, type=type, i=i, size=size
            )

        anomalous = dict.fromkeys(source.TYPES, counts.anomalous)
        yield _draw_category(name, draw, anomalous, counts)


def open_scenes(seed: int, size: int, counts: Counts) -> Iterator[Category]:
    """Drawn trays: seed s has the designs 1000 + 10 s and the next two."""
    from ulsad_jax.data import synthetic
    from ulsad_jax.metrics.image import LOGICAL, STRUCTURAL

    first = SCENES_FIRST_SEED + 10 * seed
    for number in range(first, first + SCENES):
        design = synthetic.draw_design(number, size=(size, size))

        def draw(split: str, type: str, i: int, number=number, design=design):
            sample = synthetic.draw_sample(
                design, (size, size), seed=number, split=split, type=type, i=i
            )
            masks = [mask for _, mask in sample.masks]
            union = np.any(masks, 0) if masks else np.zeros((size, size), bool)
            return sample.image, union

        anomalous = dict.fromkeys((LOGICAL, STRUCTURAL), 3 * counts.anomalous)
        yield _draw_category(f"tray_{number}", draw, anomalous, counts)


def open_tiles(root: str, seed: int, size: int, counts: Counts) -> Iterator[Category]:
    """Magnetic tiles, with the project's split; `seed` chooses among them."""
    from ulsad_jax.data import magnetic_tile, records
    from ulsad_jax.data.resize import resize_bilinear, resize_nearest

    found = records.check(magnetic_tile.records(Path(root), "magnetic_tile"), root)
    train = [r for r in found if r.split == records.TRAIN]
    test = [r for r in found if r.split == records.TEST]
    train, validation = records.hold_out(train, fraction=0.1, seed=seed)
    limit, rng = counts.tiles, np.random.default_rng(seed)
    train = _choose(train, 2 * limit, rng)
    validation = _choose(validation, limit, rng)
    kinds = sorted({r.type for r in test}, key=lambda kind: (kind != GOOD, kind))
    test = [
        r for k in kinds for r in _choose([r for r in test if r.type == k], limit, rng)
    ]

    def read(chosen: Sequence) -> np.ndarray:
        shape = (size, size)
        images = (records.read_image(r.image) for r in chosen)
        return np.stack([resize_bilinear(image, shape) for image in images])

    masks = np.zeros((len(test), size, size), bool)
    for mask, record in zip(masks, test, strict=True):
        if record.masks:
            height_width = records.read_image(record.image).shape[:2]
            whole, _ = records.read_mask(record.masks[0], size=height_width)
            mask[:] = resize_nearest(whole.astype(np.uint8), (size, size)) > 0
    yield Category(
        "magnetic_tile",
        read(train),
        read(validation),
        read(test),
        [r.type for r in test],
        masks,
        np.array([r.type == GOOD or bool(r.masks) for r in test]),
    )


def keep(categories: Iterator[Category], folder: Path, key: object) -> list[Category]:
    """Reads categories from `folder`, or takes and writes them there."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = folder / f"{name}.npz"
    fields = Category._fields
    if not path.is_file():
        found = list(categories)
        arrays = {
            f"{i}/{field}": np.asarray(value)
            for i, category in enumerate(found)
            for field, value in zip(fields, category, strict=True)
        }
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npz")  # others may write it, too
        np.savez(partial, **arrays)
        partial.replace(path)
        return found
    with np.load(path) as arrays:
        count = len(arrays.files) // len(fields)
        found = [[arrays[f"{i}/{f}"] for f in fields] for i in range(count)]
    return [
        Category(str(name), *images, types.tolist(), *masks)
        for name, *images, types, masks_, known in found
        for masks in [(masks_, known)]
    ]


def _draw_category(
    name: str, draw: Callable, anomalous: dict[str, int], counts: Counts
) -> Category:
    def stack(split: str, type: str, count: int):
        samples = [draw(split, type, i) for i in range(count)]
        return tuple(np.stack(part) for part in zip(*samples, strict=True))

    tested = {GOOD: counts.good, **anomalous}
    images, masks = zip(*(stack("test", t, n) for t, n in tested.items()), strict=True)
    types = [t for t, n in tested.items() for _ in range(n)]
    return Category(
        name,
        stack("train", GOOD, counts.train)[0],
        stack("validation", GOOD, counts.validation)[0],
        np.concatenate(images),
        types,
        np.concatenate(masks),
        np.ones(len(types), bool),
    )


def _choose(records: list, limit: int, rng: np.random.Generator) -> list:
    if not limit or len(records) <= limit:
        return records
    return [records[i] for i in sorted(rng.permutation(len(records))[:limit])]
