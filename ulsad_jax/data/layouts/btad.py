"""BTAD (beanTech).

    [BTech_Dataset_transformed/]<category>/train/ok/*.{bmp,png}
    [BTech_Dataset_transformed/]<category>/test/{ok,ko}/*.{bmp,png}
    [BTech_Dataset_transformed/]<category>/ground_truth/ko/*.{bmp,png}

A mask has its image's stem; its file format differs by category.
"""

from __future__ import annotations

from pathlib import Path

from ulsad_jax.data.records import Record, add_masks, list_categories, list_records

CATEGORIES = ("01", "02", "03")
FOLDER = "BTech_Dataset_transformed"  # what the archive unpacks to


def categories(root: Path) -> list[str]:
    """The categories found under `root`, or in the archive's folder in it."""
    return list_categories(_inside(root))


def records(root: Path, category: str) -> list[Record]:
    """One record an image of `category`.

    Raises:
        UserError: several files could be the mask of one image.
    """
    folder = _inside(root) / category
    images = list_records(folder, normal=("ok",))
    return add_masks(images, folder / "ground_truth", endings=("",))


def _inside(root: Path) -> Path:
    return root / FOLDER if (root / FOLDER).is_dir() else root
