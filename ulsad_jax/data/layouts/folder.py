"""The layout of a user's own images in a folder.

    train/<normal>/*, or train/*                   normal images
    validation/<normal>/*, or validation/*         normal images (optional)
    test/<type>/*                                  test images (optional)
    ground_truth/<type>/<stem>[_mask].<ending>     masks, if they are known

`val/` is accepted instead of `validation/`. A test type is normal if its folder is
named good, ok or normal, or has the name of the one folder in train/ that holds all
training images.
"""

from __future__ import annotations

from pathlib import Path

from ulsad_jax.data.folders import add_masks, list_folders, list_images, list_split
from ulsad_jax.data.layouts.base import Layout
from ulsad_jax.data.records import GOOD, TEST, TRAIN, VALIDATION, Record
from ulsad_jax.data.unused import GROUND_TRUTH, Places
from ulsad_jax.runtime.errors import UserError

NORMAL_NAMES = (GOOD, "ok", "normal")


def categories(root: Path) -> list[str]:
    """Returns the only category, named after the folder."""
    return [root.resolve().name]


def records(root: Path, category: str) -> list[Record]:
    """Returns one record per image.

    Raises:
        UserError: a test image is not in a folder of its type; train/ has folders that
            may hold defects; there are two folders of validation images; several files
            could be the mask of one image, or one file could be the mask of several
            images.
    """
    if stray := list_images(root / TEST):
        raise UserError(
            f"Expected test images in {root / TEST}/<type>/, found {stray[0].name} "
            f"(of {len(stray)}) outside such a folder. Move normal images to "
            f"{TEST}/{GOOD}/ and the others to a folder named for their kind."
        )
    train, validation = root / TRAIN, _find_validation(root)
    trained = {folder.name.lower() for folder in list_folders(train)}
    found = [
        *(Record(image, TRAIN) for image in list_images(train)),
        *list_split(train, TRAIN, normal=trained),
        *(Record(image, VALIDATION) for image in list_images(validation)),
        *list_split(validation, VALIDATION, normal={*trained, *NORMAL_NAMES}),
        *list_split(root / TEST, TEST, normal=_find_normal_types(root)),
    ]
    return add_masks(found, root / GROUND_TRUTH, endings=("", "_mask"))


def places(root: Path, category: str) -> Places:
    """Returns the places where files of the folder are searched."""
    return Places(
        root,
        [root],
        "images are read from train/, train/<name>/, validation/, validation/good/ "
        "and test/<type>/ alone, masks from ground_truth/<type>/",
        masks=f"{GROUND_TRUTH}/{{type}}/{{stem}}[_mask]",
    )


def _find_validation(root: Path) -> Path:
    """Returns the folder of validation images, which may not exist.

    Raises:
        UserError: there are two such folders.
    """
    folder, short = root / VALIDATION, root / "val"
    if not short.is_dir():
        return folder
    if folder.is_dir():
        raise UserError(
            f"Expected one folder of validation images, found {folder} and {short}. "
            "Move the images of one to the other."
        )
    return short


def _find_normal_types(root: Path) -> set[str]:
    """Returns the names of folders of normal images in test/, in lower case.

    Raises:
        UserError: train/ has another folder besides good, ok or normal; or train/ has
            several other folders, one of which is also in test/, so that it is unclear
            which types are normal.
    """
    train = root / TRAIN
    folders = [f.name for f in list_folders(train) if list_images(f)]
    others = [name for name in folders if name.lower() not in NORMAL_NAMES]
    if len(folders) == 1 and not list_images(train):
        return {folders[0].lower(), *NORMAL_NAMES}
    if others and others != folders:
        named = ", ".join(name for name in folders if name not in others)
        raise UserError(
            f"Expected only normal images in {train}, found {', '.join(others)} beside "
            f"{named}. Move images of defects to {TEST}/<kind of defect>/, and normal "
            f"ones into {TRAIN}/{named.split(', ')[0]}/."
        )
    tested = {f.name.lower() for f in list_folders(root / TEST) if list_images(f)}
    if shared := [name for name in others if name.lower() in tested]:
        raise UserError(
            f"Expected only normal images in {train}, found {', '.join(folders)} there "
            f"and {', '.join(shared)} in {TEST}/, too, which does not tell what is "
            f"normal. Move images of defects out of {TRAIN}/, and call folders of "
            f"normal images in {TEST}/ {GOOD}."
        )
    return {*NORMAL_NAMES}


LAYOUTS = {"folder": Layout("A folder of images", categories, records, (), places)}
