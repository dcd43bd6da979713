"""The layout of MVTec LOCO AD.

    <category>/{train,validation}/good/NNN.png
    <category>/test/{good,logical_anomalies,structural_anomalies}/NNN.png
    <category>/ground_truth/<type>/NNN/000.png ...    one file per channel
    <category>/defects_config.json                    saturation thresholds

Image numbers restart in each type's folder. The only non-zero pixel value of a channel
selects its entry of `defects_config.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from ulsad_jax.data.folders import (
    check_masks,
    list_categories,
    list_images,
    list_records,
)
from ulsad_jax.data.layouts.base import Layout
from ulsad_jax.data.records import ANOMALOUS, Mask, Record, Saturation
from ulsad_jax.data.unused import GROUND_TRUTH, Places
from ulsad_jax.runtime.errors import UserError

CATEGORIES = (
    "breakfast_box",
    "juice_bottle",
    "pushpins",
    "screw_bag",
    "splicing_connectors",
)
FIELDS = {
    "defect_name": (str,),
    "pixel_value": (int,),
    "saturation_threshold": (int, float),
    "relative_saturation": (bool,),
}


def categories(root: Path) -> list[str]:
    """Returns the categories found in `root`."""
    return list_categories(root)


def records(root: Path, category: str) -> list[Record]:
    """Returns one record per image of `category`.

    Raises:
        UserError: `defects_config.json` is missing or malformed, or several images
            could have the same mask.
    """
    folder = root / category
    saturations = _read_saturations(folder / "defects_config.json")
    found = []
    for record in list_records(folder):
        if record.label == ANOMALOUS:
            channels = folder / GROUND_TRUTH / record.type / record.image.stem
            masks = [Mask(p, saturations=saturations) for p in list_images(channels)]
            record = dataclasses.replace(record, masks=tuple(masks))
        found.append(record)
    return check_masks(found)


def places(root: Path, category: str) -> Places:
    """Returns the places where files of `category` are searched."""
    folder = root / category
    return Places(
        folder,
        [folder],
        "images are read from train/good/, validation/good/ and test/<type>/ alone, "
        "masks from ground_truth/<type>/<stem>/",
        masks=f"{GROUND_TRUTH}/{{type}}/{{stem}}/<channel>",
    )


def _read_saturations(path: Path) -> dict[int, Saturation]:
    """Reads the saturation rule of each pixel value."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _config_error(path, f"no readable file ({error.strerror})") from error
    except ValueError as error:
        raise _config_error(path, f"text that is not JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise _config_error(path, f"{entries!r:.80}")
    saturations: dict[int, Saturation] = {}
    for number, entry in enumerate(entries, start=1):
        value, saturation = _read_entry(entry, path, number)
        if saturations.setdefault(value, saturation) != saturation:
            raise _config_error(path, f"two rules for pixel_value {value}")
    return saturations


def _read_entry(entry: object, path: Path, number: int) -> tuple[int, Saturation]:
    """Returns the pixel value and the saturation rule of one entry."""
    if not isinstance(entry, Mapping):
        raise _config_error(path, f"{entry!r:.80} as entry {number}")
    for key, kinds in FIELDS.items():
        if key not in entry:
            raise _config_error(path, f"no {key!r} in entry {number}")
        # Not isinstance(), which accepts a bool as an int.
        if type(entry[key]) not in kinds:
            raise _config_error(path, f"{key} = {entry[key]!r:.80} in entry {number}")
    name, value, threshold, relative = (entry[key] for key in FIELDS)
    if not 1 <= value <= 255:
        raise _config_error(path, f"pixel_value = {value} in entry {number}")
    if not 0 < threshold <= (1 if relative else float("inf")):
        raise _config_error(
            path, f"saturation_threshold = {threshold} in entry {number}"
        )
    return value, Saturation(name, float(threshold), relative)


def _config_error(path: Path, found: str) -> UserError:
    return UserError(
        f"Expected {path} to be a JSON list of entries, each with a defect_name, a "
        "pixel_value (1 to 255, its own for each rule), a saturation_threshold (above "
        "0; a share up to 1 where relative_saturation is true) and a "
        f"relative_saturation (true or false), found {found}. Restore the file from "
        "the data set's archive, or use the config of the data set that lies there."
    )


LAYOUTS = {
    "mvtec_loco": Layout(
        "MVTec LOCO AD", categories, records, CATEGORIES, places, has_saturation=True
    ),
    # Categories that `ulsad_jax.data.synthetic` draws.
    "synthetic": Layout(
        "Drawn categories", categories, records, (), places, has_saturation=True
    ),
}
