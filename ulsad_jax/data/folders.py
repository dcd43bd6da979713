"""Images and masks in folders whose names give their split and type."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

from ulsad_jax.data.records import (
    ANOMALOUS,
    GOOD,
    IMAGE_SUFFIXES,
    SPLITS,
    TEST,
    TRAIN,
    Mask,
    Record,
)
from ulsad_jax.runtime.errors import UserError

# Folders that systems and archives leave behind, in lower case.
JUNK_FOLDERS = (
    "__macosx",
    "$recycle.bin",
    "system volume information",
    "@eadir",
    "#recycle",
    "lost+found",
)


def is_junk_folder(name: str) -> bool:
    """Returns whether a folder is hidden or was left behind by a system or archive."""
    return name.startswith(".") or name.lower() in JUNK_FOLDERS


def list_images(folder: Path) -> list[Path]:
    """Returns the image files directly in `folder`, sorted; [] if it is missing."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and not path.is_dir()  # a broken link is kept, so that it raises an error
    )


def list_folders(folder: Path) -> list[Path]:
    """Returns the folders directly in `folder`, sorted; [] if it is missing.

    Junk folders are left out.
    """
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not is_junk_folder(path.name)
    )


def list_categories(root: Path) -> list[str]:
    """Returns the names of the folders in `root` that contain `train` or `test`."""
    return [
        folder.name
        for folder in list_folders(root)
        if (folder / TRAIN).is_dir() or (folder / TEST).is_dir()
    ]


def list_records(folder: Path, *, normal: Collection[str] = (GOOD,)) -> list[Record]:
    """Returns the images of `folder/<split>/<type>/` as records without masks.

    Args:
        folder: folder of the category.
        normal: names of folders of normal images, in lower case.
    """
    return [
        record
        for split in SPLITS
        for record in list_split(folder / split, split, normal=normal)
    ]


def list_split(folder: Path, split: str, *, normal: Collection[str]) -> list[Record]:
    """Returns the images of `folder/<type>/` as records without masks.

    Args:
        folder: folder of the split.
        split: name of the split.
        normal: names of folders of normal images, in lower case.
    """
    return [
        Record(image, split, GOOD if sub.name.lower() in normal else sub.name)
        for sub in list_folders(folder)
        for image in list_images(sub)
    ]


def add_masks(
    records: Iterable[Record], ground_truth: Path, *, endings: Collection[str]
) -> list[Record]:
    """Adds the mask `ground_truth/<type>/<stem><ending>.<any>` to anomalous records.

    A record whose mask does not exist stays without one.

    Args:
        records: records without masks.
        ground_truth: folder of the masks.
        endings: possible endings after an image's stem, such as "_mask".

    Raises:
        UserError: several files could be the mask of one image, or one file could be
            the mask of several images.
    """
    folders: dict[Path, dict[str, list[Path]]] = {}
    found = []
    for record in records:
        if record.label == ANOMALOUS:
            folder = ground_truth / record.image.parent.name
            if folder not in folders:
                folders[folder] = _by_stem(list_images(folder))
            stems = (record.image.stem + ending for ending in endings)
            paths = [path for stem in stems for path in folders[folder].get(stem, ())]
            if len(paths) > 1:
                raise UserError(
                    f"Expected one mask for {record.image}, found {len(paths)} in "
                    f"{folder}: {', '.join(path.name for path in paths)}. Keep one."
                )
            record = dataclasses.replace(record, masks=tuple(map(Mask, paths)))
        found.append(record)
    return check_masks(found)


def check_masks(records: list[Record]) -> list[Record]:
    """Returns the records after checking that no two images share a mask.

    Args:
        records: records whose masks were found by name.

    Raises:
        UserError: two images of a split, such as "000.jpg" and "000.png", have the same
            mask.
    """
    owners: dict[tuple[Path, str], Record] = {}
    for record in records:
        for mask in record.masks:
            owner = owners.setdefault((mask.path, record.split), record)
            if owner is not record:
                raise UserError(
                    f"Expected one image of the mask {mask.path}, found two: "
                    f"{owner.image} and {record.image}. Rename one of them, and give "
                    "it a mask of its own."
                )
    return records


def _by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    stems = defaultdict(list)
    for path in paths:
        stems[path.stem].append(path)
    return stems
