"""Images and masks in folders that are named for what they hold."""

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

# What systems and archives leave behind, in lower case.
JUNK_FOLDERS = (
    "__macosx",
    "$recycle.bin",
    "system volume information",
    "@eadir",
    "#recycle",
    "lost+found",
)


def is_junk_folder(name: str) -> bool:
    """Returns whether a folder of this name holds no one's images."""
    return name.startswith(".") or name.lower() in JUNK_FOLDERS


def list_images(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted; [] where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and not path.is_dir()  # a link to nothing stays, so that it is complained of
    )


def list_folders(folder: Path) -> list[Path]:
    """The folders directly in `folder`, sorted; [] where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not is_junk_folder(path.name)
    )


def list_categories(root: Path) -> list[str]:
    """The folders of `root` that hold a folder `train` or `test`."""
    return [
        folder.name
        for folder in list_folders(root)
        if (folder / TRAIN).is_dir() or (folder / TEST).is_dir()
    ]


def list_records(folder: Path, *, normal: Collection[str] = (GOOD,)) -> list[Record]:
    """The images of `folder/<split>/<type>/`, without masks.

    Args:
        folder: a category's folder.
        normal: what folders of normal images are called, in lower case.
    """
    return [
        record
        for split in SPLITS
        for record in list_split(folder / split, split, normal=normal)
    ]


def list_split(folder: Path, split: str, *, normal: Collection[str]) -> list[Record]:
    """Returns the images of `folder/<type>/`, without masks.

    Args:
        folder: the split's.
        split: its name.
        normal: what folders of normal images are called, in lower case.
    """
    return [
        Record(image, split, GOOD if sub.name.lower() in normal else sub.name)
        for sub in list_folders(folder)
        for image in list_images(sub)
    ]


def add_masks(
    records: Iterable[Record], ground_truth: Path, *, endings: Collection[str]
) -> list[Record]:
    """Gives anomalous records the mask `ground_truth/<type>/<stem><ending>.<any>`.

    A record whose mask is not there stays without.

    Raises:
        UserError: several files could be the mask of one image, or one that of several.
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
    """Returns records that were given masks by their names, if each has its own.

    Raises:
        UserError: two images of a split, "000.jpg" and "000.png", have one mask.
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
