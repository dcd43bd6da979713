"""What a data set is before it is read: one record an image.

A layout module (`mvtec_ad`, `mvtec_loco`, ...) turns a folder into records with
`categories(root)` and `records(root, category)`, and says with `places(root,
category)` where it looked. It looks at names and small text files only; images and
masks are opened by `read_image` and `read_mask` when the data set is built.
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
ANOMALY = "anomaly"  # the type where a data set does not say which kind it is
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Saturation:
    """How much of a defect must be found for full credit (MVTec LOCO's sPRO).

    Attributes:
        defect_name: the kind of defect, as the data set names it.
        threshold: pixels at original resolution, or a share of the region's area.
        relative: whether `threshold` is a share.
    """

    defect_name: str = ""
    threshold: float = 1.0
    relative: bool = True


@dataclasses.dataclass(frozen=True)
class Mask:
    """One ground-truth channel on disk.

    Attributes:
        path: the mask's file.
        above: the largest value that still means normal; 0 leaves it to the file:
            what is not 0 is defective, or after lossy compression what is above half
            of the largest value.
        saturations: for MVTec LOCO, the rule that belongs to each pixel value; the
            file holds 0 and exactly one of them. Empty elsewhere: the whole region
            must be found.
    """

    path: Path
    above: int = 0
    saturations: Mapping[int, Saturation] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """One image of a category.

    Attributes:
        image: the image's file.
        split: "train", "validation" or "test".
        type: `GOOD`, or the kind of anomaly (its folder's name).
        masks: ground-truth channels; empty for a normal image, and for an anomalous
            one whose mask is not known.
        group: images of one object share it, and no split parts a group. Empty: the
            image is an object of its own.
        alias: what it is called where other images have its file's stem, see
            `tell_apart`; may hold "/". Empty: it is called by the stem.
    """

    image: Path
    split: str
    type: str = GOOD
    masks: tuple[Mask, ...] = ()
    group: str = ""
    alias: str = ""

    @property
    def label(self) -> int:
        """`NORMAL` or `ANOMALOUS`."""
        return NORMAL if self.type == GOOD else ANOMALOUS

    @property
    def stem(self) -> str:
        """Unique within a split's type: the file's stem, or `alias`."""
        return self.alias or self.image.stem

    @property
    def name(self) -> str:
        """Unique within a split: "<type>/<stem>"."""
        return f"{self.type}/{self.stem}"


def check(records: Sequence[Record], where: Path) -> list[Record]:
    """Refuses records that clash, or none.

    Returns:
        The records, told apart, in a fixed order: by split, normal before anomalous,
        by name.

    Raises:
        UserError: no image; an anomalous image to be trained on; one image twice
            in a split; a name that is not UTF-8.
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
    """Gives images that would have one name in a split names by their paths.

    The paths begin where they part, "day1/000" and "day2/000"; files of one folder
    keep their endings, "000.jpg" and "000.png". Other images keep their names.
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
    """Returns the error of a data set in which some kind of images is missing.

    Args:
        what: the kind, such as "normal training images".
        where: the data set's folder or table.
    """
    return UserError(
        f"Expected {what} under {where}, found none. Check the folder's layout "
        "(README, section Real data) and that the archive was unpacked whole. Image "
        f"files end in {', '.join(IMAGE_SUFFIXES)}."
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
    """A hash that changes when a source file is added, removed or rewritten.

    It covers what the records say and each file's size and modification time, so
    that it costs no reading of images.

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
    """Parts `records` into (kept, held out), never parting a group.

    Groups are shuffled by `seed` and held out until `fraction` of the images, and at
    least one image, is reached.

    Raises:
        UserError: nothing would be left on one of the two sides.
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
    """Reads a file whole.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def read_image(
    path: str | os.PathLike[str], data: bytes | None = None, *, white_level: float = 0.0
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image file as 8-bit RGB, upright, see `pixels.to_rgb`.

    Args:
        path: the file.
        data: its content, where that was read already.
        white_level: the value that means white in files of more than 8 bits a channel;
            0 where that is not given.

    Raises:
        UserError: the file is truncated, is no image, has more pixels than Pillow
            takes (178 956 970, against files that are small and unpack to fill the
            memory), cannot be opened, or needs a white level.
    """
    with open_image(path, data) as image:
        values = pixels.decode(image, exact=bool(white_level), where=os.fspath(path))
    return pixels.to_rgb(values, white_level, where=os.fspath(path))


def read_mask(
    mask: Mask, data: bytes | None = None, *, size: tuple[int, int]
) -> tuple[Bool[np.ndarray, "h w"], Saturation]:
    """Reads a ground-truth channel and the saturation rule that belongs to it.

    Args:
        mask: the mask.
        data: the content of its file, where that was read already.
        size: (height, width) of its image.

    Raises:
        UserError: an unreadable file; colours in which black is not 0; another size
            than the image's; for MVTec LOCO, not exactly one non-zero value or one
            that `defects_config.json` lacks.
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
        # Numbers below 0 are not 0; Pillow reads large unsigned ones so, too.
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
    """Reads one value a pixel: colours on black, their largest channel."""
    image = _open(path, data)
    if image.mode in ("CMYK", "LAB"):
        raise UserError(
            f"Expected the mask {path} in grey, RGB, RGBA or palette colours, found "
            f"{image.mode}, in which black is not 0. Save it as a PNG file."
        )
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, which RGBA would cut
        return np.asarray(image)
    rgba = np.asarray(image.convert("RGBA"))
    return rgba[..., :3].max(axis=-1) * (rgba[..., 3] / np.float32(255))


def _open(path: str | os.PathLike[str], data: bytes | None = None) -> Image.Image:
    """Opens and decodes an image file whole, upright."""
    with open_image(path, data) as image:
        return pixels.upright(image)


@contextlib.contextmanager
def open_image(
    path: str | os.PathLike[str], data: bytes | None = None
) -> Iterator[Image.Image]:
    """Opens an image file; what goes wrong inside is an error that names it.

    Args:
        path: the file.
        data: its content, where that was read already.

    Raises:
        UserError: see `read_image`.
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
