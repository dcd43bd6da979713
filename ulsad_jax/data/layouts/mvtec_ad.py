"""The layout of MVTec AD and MPDD.

    <category>/train/good/NNN.png
    <category>/test/{good,<defect>}/NNN.png
    <category>/ground_truth/<defect>/NNN_mask.png

MPDD has the same folders as MVTec AD.
"""

from __future__ import annotations

from pathlib import Path

from ulsad_jax.data.folders import add_masks, list_categories, list_records
from ulsad_jax.data.layouts.base import Layout
from ulsad_jax.data.records import Record
from ulsad_jax.data.unused import GROUND_TRUTH, Places

CATEGORIES = (
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
)
MPDD_CATEGORIES = (
    "bracket_black",
    "bracket_brown",
    "bracket_white",
    "connector",
    "metal_plate",
    "tubes",
)


def categories(root: Path) -> list[str]:
    """Returns the categories found in `root`."""
    return list_categories(root)


def records(root: Path, category: str) -> list[Record]:
    """Returns one record per image of `category`.

    Raises:
        UserError: several files could be the mask of one image.
    """
    folder = root / category
    return add_masks(list_records(folder), folder / GROUND_TRUTH, endings=("_mask",))


def places(root: Path, category: str) -> Places:
    """Returns the places where files of `category` are searched."""
    folder = root / category
    return Places(
        folder,
        [folder],
        "images are read from train/good/, validation/good/ and test/<type>/ alone, "
        "masks from ground_truth/<type>/",
        masks=f"{GROUND_TRUTH}/{{type}}/{{stem}}_mask",
    )


LAYOUTS = {
    "mvtec_ad": Layout("MVTec AD", categories, records, CATEGORIES, places),
    "mpdd": Layout("MPDD", categories, records, MPDD_CATEGORIES, places),
}
