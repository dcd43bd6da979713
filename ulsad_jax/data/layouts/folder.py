"""A user's own images in a folder.

    train/<normal>/*, or train/*                   normal images
    validation/<normal>/*, or validation/*         normal images, if any
    test/<type>/*                                  if any
    ground_truth/<type>/<stem>[_mask].<ending>     masks, as far as they are known

A type is normal if its folder is called as one in train/ is, or good, ok or normal.
"""

from __future__ import annotations

from pathlib import Path

from ulsad_jax.data.records import (
    GOOD,
    TEST,
    TRAIN,
    VALIDATION,
    Record,
    add_masks,
    list_folders,
    list_images,
    list_records,
)
from ulsad_jax.runtime.errors import UserError

NORMAL_NAMES = (GOOD, "ok", "normal")


def categories(root: Path) -> list[str]:
    """The one category: the folder's name."""
    return [root.resolve().name]


def records(root: Path, category: str) -> list[Record]:
    """One record an image.

    Raises:
        UserError: test images outside a type's folder; several files could be the
            mask of one image.
    """
    if stray := list_images(root / TEST):
        raise UserError(
            f"Expected test images in {root / TEST}/<type>/, found {stray[0].name} "
            f"(of {len(stray)}) outside such a folder. Move normal images to "
            f"{TEST}/{GOOD}/ and the others to a folder named for their kind."
        )
    normal = {f.name.lower() for f in list_folders(root / TRAIN)} | {*NORMAL_NAMES}
    direct = [
        Record(image, split)
        for split in (TRAIN, VALIDATION)
        for image in list_images(root / split)
    ]
    found = direct + list_records(root, normal=normal)
    return add_masks(found, root / "ground_truth", endings=("", "_mask"))
