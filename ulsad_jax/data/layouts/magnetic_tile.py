"""The layout of Magnetic Tile Defects (Huang et al., The Visual Computer 2020).

    MT_Free/Imgs/exp<k>_num_<n>.jpg               normal
    MT_<Defect>/Imgs/exp<k>_num_<n>.{jpg,png}     image and mask

In the order of n, a run of normal images with increasing k shows one tile at several
exposures. 80 % of the normal images, in whole tiles, are used for training. The others
and all defects are the test set, as in DifferNet and PatchCore. The published data set
has no split; this one is fixed by `SEED`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ulsad_jax.data.folders import list_folders, list_images
from ulsad_jax.data.layouts.base import Layout
from ulsad_jax.data.records import GOOD, TEST, TRAIN, Mask, Record, hold_out
from ulsad_jax.data.unused import Places
from ulsad_jax.runtime.errors import UserError

CATEGORIES = ("magnetic_tile",)
TEST_FRACTION = 0.2
SEED = 0
MASK_ABOVE = 127  # masks are smoothed

# Runs that show the same tile, given by their first n: two tiles were photographed
# alternately, or one tile twice. This is visible in the images, not in their names.
SAME_TILE = (
    (743, 855, 913, 964),
    (5874, 5907),
    (6508, 6539, 6558, 6571, 6605),
    (8676, 10334),
    (37056, 37243, 37262, 37273, 37556),
    (53011, 65001),
    (116949, 117033),
    (320808, 320895),
    (355636, 358102),
)
_FIRST_RUN = {n: runs[0] for runs in SAME_TILE for n in runs}


def categories(root: Path) -> list[str]:
    """Returns the only category if `root` holds any MT_<type> folder, else []."""
    return list(CATEGORIES) if _type_folders(root) else []


def records(root: Path, category: str) -> list[Record]:
    """Returns one record per image.

    Raises:
        UserError: the name of a normal image does not give its exposure and number, or
            there are fewer than two normal tiles.
    """
    normal: list[Record] = []
    defects: list[Record] = []
    for kind, folder in _type_folders(root).items():
        images = _photographs(folder)
        if kind == GOOD:
            normal = _group_by_tile(images)
        else:
            defects += [Record(p, TEST, kind, _mask_beside(p)) for p in images]
    if not normal:
        return defects
    kept, held = hold_out(normal, fraction=TEST_FRACTION, seed=SEED)
    return kept + [dataclasses.replace(r, split=TEST) for r in held] + defects


def places(root: Path, category: str) -> Places:
    """Returns the places where files of the data set are searched."""
    folders = _type_folders(root)
    normal = _photographs(folders[GOOD]) if GOOD in folders else []
    return Places(
        root,
        [folder.parent for folder in folders.values()],
        "MT_<type>/Imgs/<name>.jpg is read, and its mask <name>.png beside it",
        known=[image.with_suffix(".png") for image in normal],
    )


def _photographs(folder: Path) -> list[Path]:
    return [p for p in list_images(folder) if p.suffix.lower() == ".jpg"]


def _type_folders(root: Path) -> dict[str, Path]:
    """Returns the folder of each type, such as `MT_Blowhole/Imgs` for "blowhole"."""
    folders = {}
    for folder in list_folders(root):
        prefix, _, kind = folder.name.lower().partition("_")
        if prefix == "mt" and kind and (folder / "Imgs").is_dir():
            folders[GOOD if kind == "free" else kind] = folder / "Imgs"
    return folders


def _mask_beside(image: Path) -> tuple[Mask, ...]:
    path = image.with_suffix(".png")
    return (Mask(path, above=MASK_ABOVE),) if path.is_file() else ()


def _group_by_tile(images: list[Path]) -> list[Record]:
    """Returns training records that are grouped by tile."""
    found = []
    tile, previous = 0, None
    for number, exposure, image in sorted((*_parse(p), p) for p in images):
        if previous is None or exposure <= previous:
            tile = _FIRST_RUN.get(number, number)
        previous = exposure
        found.append(Record(image, TRAIN, group=f"tile_{tile}"))
    return found


def _parse(image: Path) -> tuple[int, int]:
    """Returns the (n, k) of a name exp<k>_num_<n>.

    Raises:
        UserError: the name has another form.
    """
    match = re.fullmatch(r"exp(\d+)_num_(\d+)", image.stem)
    if match is None:
        raise UserError(
            "Expected names such as exp1_num_743.jpg, which say what images show one "
            f"tile, found {image}. Restore its name, or remove it."
        )
    return int(match[2]), int(match[1])


LAYOUTS = {
    "magnetic_tile": Layout(
        "Magnetic Tile Defects", categories, records, CATEGORIES, places
    )
}
