"""Records, one for each image of a data set before it is read.

A layout module (`mvtec_ad`, `mvtec_loco`, ...) lists the records of a folder with
`categories(root)` and `records(root, category)`, and the folders that it searches with
`places(root, category)`. It reads names and small text files only. Images and masks are
opened by `open_image` and `read_mask` when the data set is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ulsad_jax.data import lossy, pixels
from ulsad_jax.data.file_warnings import naming
from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Shaped, UInt8

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
NORMAL, ANOMALOUS = 0, 1
GOOD = "good"  # the type of every normal image, whatever its folder is called
ANOMALY = "anomaly"  # the type if a data set does not give the kind
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Saturation:
    """The part of a defect that must be found for full credit (MVTec LOCO's sPRO).

    Attributes:
        defect_name: kind of defect, named as in the data set.
        threshold: area in pixels at the original resolution, or fraction of the
            region's area.
        relative: True if `threshold` is a fraction.
    """

    defect_name: str = ""
    threshold: float = 1.0
    relative: bool = True


@dataclasses.dataclass(frozen=True)
class Mask:
    """A ground-truth channel on disk.

    Attributes:
        path: path of the mask's file.
        above: largest value that still means normal. If 0, it depends on the file:
            pixels that are not 0 are defective, or, after lossy compression, pixels
            above half of the largest value.
        saturations: saturation rule of each pixel value, for MVTec LOCO. The file holds
            0 and exactly one of these values. Empty for other data sets: the whole
            region must be found.
    """

    path: Path
    above: int = 0
    saturations: Mapping[int, Saturation] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """One image of a category.

    Attributes:
        image: path of the image's file.
        split: "train", "validation" or "test".
        type: `GOOD`, or the kind of anomaly (the name of its folder).
        masks: ground-truth channels; empty for a normal image, and for an anomalous
            image whose mask is not known.
        group: name shared by all images of one object; a group is never divided between
            splits. If empty, the image is an object of its own.
        alias: name of the image if other images have the same file stem, see
            `tell_apart`; may contain "/". If empty, the file stem is the name.
    """

    image: Path
    split: str
    type: str = GOOD
    masks: tuple[Mask, ...] = ()
    group: str = ""
    alias: str = ""

    @property
    def label(self) -> int:
        """Label of the image, `NORMAL` or `ANOMALOUS`."""
        return NORMAL if self.type == GOOD else ANOMALOUS

    @property
    def stem(self) -> str:
        """Stem of the file, or `alias`; unique within a split's type."""
        return self.alias or self.image.stem

    @property
    def name(self) -> str:
        """Name "<type>/<stem>", unique within a split."""
        return f"{self.type}/{self.stem}"


def check(records: Sequence[Record], where: Path) -> list[Record]:
    """Returns the records in a fixed order after checking them for conflicts.

    Args:
        records: records of a category.
        where: folder or table of the data set, used in error messages.

    Returns:
        The records with unique names, sorted by split, then normal before anomalous,
        then by name.

    Raises:
        UserError: there is no image; an anomalous image is not in the test split; a
            split contains an image twice; a name is not UTF-8.
    """
    if not records:
        raise no_images("images", where)
    seen: dict[tuple[str, str], Record] = {}
    records = tell_apart(records)
    for record in records:
        if record.label == ANOMALOUS and record.split != TEST:
            raise UserError(
                f"Expected only normal images in the {record.split} split, found "
                f"{record.image} of type {record.type!r}. Move it to the test split."
            )
        _check_name(record.image)
        twin = seen.setdefault((record.split, record.name), record)
        if twin is not record:
            raise UserError(
                f"Expected one image named {record.name!r} in the {record.split} "
                f"split, found two: {twin.image} and {record.image}. Rename one, or "
                "list it once."
            )
    return sorted(records, key=lambda r: (SPLITS.index(r.split), r.label, r.name))


def tell_apart(records: Iterable[Record]) -> list[Record]:
    """Gives images that share a name within a split unique names from their paths.

    These names start where the paths differ, such as "day1/000" and "day2/000". Files
    in one folder keep their extensions, such as "000.jpg" and "000.png". Other images
    keep their names.
    """
    records = list(records)
    twins = defaultdict(list)
    for i, record in enumerate(records):
        twins[record.split, record.name].append(i)
    for rows in twins.values():
        images = [records[i].image for i in rows]
        if len(images) > 1:
            common = os.path.commonpath([image.parent for image in images])
            folders = Counter(image.parent for image in images)
            for i, image in zip(rows, images, strict=True):
                alone = folders[image.parent] == 1
                path = (image.with_suffix("") if alone else image).relative_to(common)
                records[i] = dataclasses.replace(records[i], alias=path.as_posix())
    return records


def no_images(what: str, where: Path) -> UserError:
    """Returns the error for a data set that lacks some kind of images.

    Args:
        what: kind of images, such as "normal training images".
        where: folder or table of the data set.
    """
    return UserError(
        f"Expected {what} under {where}, found none. Check the folder's layout "
        "(docs/data.md) and that the archive was unpacked whole. Image files end in "
        f"{', '.join(IMAGE_SUFFIXES)}."
    )


def _check_name(path: Path) -> None:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"Expected names of files and folders in UTF-8, found "
            f"{os.fsencode(path)!r}. Rename it."
        ) from error


def fingerprint(records: Iterable[Record]) -> str:
    """Returns a hash that changes when a source file is added, removed or rewritten.

    The hash covers the records and each file's size and modification time, so no image
    is read.

    Raises:
        UserError: a file of a record does not exist.
    """
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode())
        for path in (record.image, *(mask.path for mask in record.masks)):
            try:
                status = path.stat()
            except FileNotFoundError as error:
                raise UserError(
                    f"Expected the file {path}, found nothing there. Restore it, or "
                    "remove what refers to it."
                ) from error
            digest.update(f"{status.st_size} {status.st_mtime_ns};".encode())
    return digest.hexdigest()


def hold_out(
    records: Sequence[Record], *, fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Splits records into (kept, held out) without dividing a group.

    Groups are shuffled and held out until `fraction` of the images, and at least one
    image, is reached.

    Args:
        records: records to split.
        fraction: fraction of the images to hold out.
        seed: seed of the shuffling.

    Raises:
        UserError: there are fewer than two groups, so one of the parts would be empty.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group or record.name, []).append(record)
    if len(groups) < 2:
        raise UserError(
            "Expected training images of at least two objects, to hold one out for "
            f"validation, found {len(groups)} ({len(records)} images"
            f"{f', in {records[0].image.parent}' if records else ''}). Add training "
            "images, or provide a validation split."
        )
    names = sorted(groups)
    wanted = max(1.0, fraction * len(records))
    held: set[str] = set()
    count = 0
    for i in np.random.default_rng(seed).permutation(len(names))[:-1]:
        if count >= wanted:
            break
        held.add(names[i])
        count += len(groups[names[i]])
    kept = [r for r in records if (r.group or r.name) not in held]
    return kept, [r for r in records if (r.group or r.name) in held]


def read_file(path: Path) -> bytes:
    """Reads the whole content of a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def read_image(
    path: str | os.PathLike[str], data: bytes | None = None, *, white_level: float = 0.0
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image file as upright 8-bit RGB; see `pixels.to_rgb`.

    Args:
        path: path of the file.
        data: content of the file, if it was already read.
        white_level: value that means white in files with more than 8 bits per channel;
            0 if it is not given.

    Returns:
        RGB image, uint8 [h, w, 3].

    Raises:
        UserError: the file is truncated, is not an image, has more pixels than Pillow
            accepts (178 956 970, a limit against small files that fill the memory when
            unpacked), cannot be opened, or needs a white level.
    """
    with open_image(path, data) as image:
        values = pixels.decode(image, exact=bool(white_level), where=os.fspath(path))
    return pixels.to_rgb(values, white_level, where=os.fspath(path))


def read_mask(
    mask: Mask, data: bytes | None = None, *, size: tuple[int, int]
) -> tuple[Bool[np.ndarray, "h w"], Saturation]:
    """Reads a ground-truth channel and its saturation rule.

    Args:
        mask: mask to read.
        data: content of the mask's file, if it was already read.
        size: (height, width) of the image in pixels.

    Returns:
        The mask, bool [h, w], True for defective pixels, and its saturation rule.

    Raises:
        UserError: the file is unreadable; it has colours in which black is not 0; its
            size differs from the image's; for MVTec LOCO, it does not hold exactly one
            non-zero value, or `defects_config.json` lacks that value.
    """
    data = read_file(mask.path) if data is None else data
    values = _mask_values(mask.path, data)
    if values.shape != tuple(size):
        raise UserError(
            f"Expected the mask {mask.path} to have its image's size, "
            f"{size[1]} x {size[0]} (width x height), found "
            f"{values.shape[1]} x {values.shape[0]}. Draw it at the image's size."
        )
    if not mask.saturations:
        above = mask.above or lossy.highest_normal(values, data)
        # Negative values are defective, too: Pillow reads large unsigned ones so.
        return np.abs(values) > above, Saturation()
    found = [int(v) for v in np.unique(values) if v != 0]
    if len(found) != 1 or found[0] not in mask.saturations:
        raise UserError(
            f"Expected the mask {mask.path} to hold 0 and one pixel value of "
            f"defects_config.json ({sorted(mask.saturations)}), found the non-zero "
            f"values {found}. Restore the file from the data set's archive."
        )
    return values > 0, mask.saturations[found[0]]


def _mask_values(path: Path, data: bytes) -> Shaped[np.ndarray, "h w"]:
    """Reads one value per pixel: the largest channel of colours on black."""
    image = _open(path, data)
    if image.mode in ("CMYK", "LAB"):
        raise UserError(
            f"Expected the mask {path} in grey, RGB, RGBA or palette colours, found "
            f"{image.mode}, in which black is not 0. Save it as a PNG file."
        )
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, which RGBA would cut off
        return np.asarray(image)
    rgba = np.asarray(image.convert("RGBA"))
    return rgba[..., :3].max(axis=-1) * (rgba[..., 3] / np.float32(255))


def _open(path: str | os.PathLike[str], data: bytes | None = None) -> Image.Image:
    """Opens an image file and returns it completely decoded and upright."""
    with open_image(path, data) as image:
        return pixels.upright(image)


@contextlib.contextmanager
def open_image(
    path: str | os.PathLike[str], data: bytes | None = None
) -> Iterator[Image.Image]:
    """Opens an image file, and turns errors while it is read into a `UserError`.

    Args:
        path: path of the file, named in the error.
        data: content of the file, if it was already read.

    Raises:
        UserError: the file cannot be read; see `read_image`.
    """
    try:
        with (
            naming(path),
            Path(path).open("rb") if data is None else io.BytesIO(data) as file,
            Image.open(file) as image,
        ):
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: Exception) -> UserError:
    return UserError(
        f"Expected a readable image file, found {os.fspath(path)}: {error}. "
        "Replace or remove the file."
    )
