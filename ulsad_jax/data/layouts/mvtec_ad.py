"""MVTec AD, and MPDD, which has the same layout.

<category>/train/good/NNN.png
<category>/test/{good,<defect>}/NNN.png
<category>/ground_truth/<defect>/NNN_mask.png
"""

from __future__ import annotations

from pathlib import Path

from ulsad_jax.data.records import Record, add_masks, list_categories, list_records

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
    """The categories found under `root`."""
    return list_categories(root)


def records(root: Path, category: str) -> list[Record]:
    """One record an image of `category`.

    Raises:
        UserError: several files could be the mask of one image.
    """
    folder = root / category
    return add_masks(list_records(folder), folder / "ground_truth", endings=("_mask",))
