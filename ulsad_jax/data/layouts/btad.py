"""The layout of BTAD (beanTech).

    [BTech_Dataset_transformed/]<category>/train/ok/*.{bmp,png}
    [BTech_Dataset_transformed/]<category>/test/{ok,ko}/*.{bmp,png}
    [BTech_Dataset_transformed/]<category>/ground_truth/ko/*.{bmp,png}

A mask has the stem of its image. Its file format depends on the category.
"""

from __future__ import annotations

from pathlib import Path

from ulsad_jax.data.folders import add_masks, list_categories, list_records
from ulsad_jax.data.layouts.base import Layout
from ulsad_jax.data.records import Record
from ulsad_jax.data.unused import GROUND_TRUTH, Places

CATEGORIES = ("01", "02", "03")
FOLDER = "BTech_Dataset_transformed"  # top folder of the archive


def categories(root: Path) -> list[str]:
    """Returns the categories found in `root`, or in the archive's folder in it."""
    return list_categories(_inside(root))


def records(root: Path, category: str) -> list[Record]:
    """Returns one record per image of `category`.

    Raises:
        UserError: several files could be the mask of one image.
    """
    folder = _inside(root) / category
    images = list_records(folder, normal=("ok",))
    return add_masks(images, folder / GROUND_TRUTH, endings=("",))


def places(root: Path, category: str) -> Places:
    """Returns the places where files of `category` are searched."""
    folder = _inside(root) / category
    return Places(
        folder,
        [folder],
        "images are read from train/ok/, validation/ok/ and test/<type>/ alone, "
        "masks from ground_truth/<type>/",
        masks=f"{GROUND_TRUTH}/{{type}}/{{stem}}",
    )


def _inside(root: Path) -> Path:
    return root / FOLDER if (root / FOLDER).is_dir() else root


LAYOUTS = {"btad": Layout("BTAD", categories, records, CATEGORIES, places)}
