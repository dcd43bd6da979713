"""Results of a run: console table, results.json, results.csv, scores.csv."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ulsad_jax.data.records import Record
from ulsad_jax.runtime import files
from ulsad_jax.scoring.prediction import Prediction

FORMAT = 1  # of results.json, to be raised when its fields change
TABLE = {
    "image_auroc": "image AUROC",
    "image_auroc_mean_of_types": "mean of types",
    "image_average_precision": "image AP",
    "image_f1_max": "image F1",
    "pixel_auroc": "pixel AUROC",
    "pixel_auroc_original": "pixel AUROC (original size)",
    "pixel_average_precision": "pixel AP",
    "pixel_f1_max": "pixel F1",
    "aupro": "AUPRO",
    "aupro_original": "AUPRO (original size)",
    "au_spro_0.05": "AU-sPRO 0.05",
}
SCORES = (
    *("score", "normalized_score", "is_anomalous", "local_score", "global_score"),
    *("mask_area", "mask_share"),
)  # of an image, in scores.csv
# The other files and folders in the work directory of a run, of a sweep and of its
# members; a category's folder is called otherwise.
TAKEN = {
    *("config.json", "trunk.safetensors", "results.json", "results.csv"),
    *("report.html", "maps", "sweep.json", "diverged.txt"),
}
BY_TYPE = {"image_auroc": "image AUROC", "au_spro_0.05": "AU-sPRO 0.05"}


def mean_row(categories: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over categories of every metric, leaving NaN out."""
    names = dict.fromkeys(name for row in categories.values() for name in row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN: stays NaN
        return {
            name: float(
                np.nanmean([r.get(name, math.nan) for r in categories.values()])
            )
            for name in names
        }


def write(
    folder: Path,
    categories: Mapping[str, Mapping[str, float]],
    about: Mapping[str, Any],
) -> None:
    """Writes results.json and results.csv, the latter with a mean row.

    Args:
        folder: the work directory.
        categories: metrics by category.
        about: how the results were got.
    """
    mean = mean_row(categories)
    document = {
        "format": FORMAT,
        **about,
        "categories": {name: finite(row) for name, row in categories.items()},
        "mean": finite(mean),
    }
    files.replace(folder / "results.json", json.dumps(document, indent=2) + "\n")
    rows = [["category", "selected_on_test", *mean]]
    for name, row in [*categories.items(), ("mean", mean)]:
        values = (row.get(k, math.nan) for k in mean)
        rows.append([name, about["selected_on_test"], *values])
    files.replace_csv(folder / "results.csv", rows)


def write_scores(path: Path, records: Sequence[Record], prediction: Prediction) -> None:
    """Writes one row an image: what it is, its scores, decision and mask's area.

    The area is in pixels at model resolution, and as a share of the image.
    """
    size = math.prod(prediction.anomaly_map.shape[1:])
    rows: list[list[Any]] = [["image", "name", "type", "label", *SCORES]]
    for i, record in enumerate(records):
        scores = [getattr(prediction, name)[i].item() for name in SCORES[:-1]]
        row = [record.image, record.name, record.type, record.label, *scores]
        rows.append([*row, prediction.mask_area[i] / size])
    files.replace_csv(path, rows)


def table(
    categories: Mapping[str, Mapping[str, float]], about: Mapping[str, Any]
) -> str:
    """The headline metrics in percent, one line a category, and what they rest on."""
    rows = list(categories.items())
    if len(rows) > 1:
        rows.append(("mean", mean_row(categories)))
    columns = [k for k in TABLE if any(k in row for _, row in rows)]
    width = max(len(name) for name in ("category", *(name for name, _ in rows)))
    lines = ["  ".join(["category".ljust(width), *(TABLE[k] for k in columns)])]
    for name, row in rows:
        cells = [_percent(row.get(k, math.nan)).rjust(len(TABLE[k])) for k in columns]
        lines.append("  ".join([name.ljust(width), *cells]))
    for name, row in categories.items():
        for metric, title in BY_TYPE.items():
            types = {
                k.partition("/")[2]: v
                for k, v in row.items()
                if k.startswith(f"{metric}/")
            }
            if types:
                listed = ", ".join(f"{k} {_percent(v)}" for k, v in types.items())
                lines.append(f"{name}, {title} by type: {listed}")
        lines += [f"{name}, {note}" for note in pixel_notes(row)]
        if name in about.get("decisions", {}):
            lines += _decision_lines(name, row, **about["decisions"][name])
    if about["selected_on_test"]:
        lines.append(
            "SELECTED ON THE TEST SET: the checkpoint is the best of these very images "
            "(the reference's protocol); do not compare with honest results."
        )
    return "\n".join(lines)


def pixel_notes(row: Mapping[str, float]) -> list[str]:
    """Returns what pixel metrics of a category do not see, a sentence each."""
    notes = []
    left_out = int(row.get("pixel_images_left_out", 0))
    if left_out:
        notes.append(
            f"pixel metrics leave out {left_out} anomalous images without a "
            "mask or with an empty one."
        )
    if lost := int(row.get("masks_lost", 0)):
        advice = (
            "see the metrics at original size"
            if "aupro_original" in row
            else "measure with --config.evaluation.original_resolution=True"
        )
        notes.append(
            f"{lost} of {int(row['test_anomalous']) - left_out} masks have no pixel "
            "left at model resolution, whose pixel metrics do not see these defects: "
            f"{advice}, or set a larger config.image_size."
        )
    return notes


def finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: an undefined metric is null."""
    return {k: v if math.isfinite(v) else None for k, v in row.items()}


def with_nan(row: Mapping[str, float | None]) -> dict[str, float]:
    """What `finite` made JSON of: null is NaN."""
    return {k: math.nan if v is None else v for k, v in row.items()}


def file_name(name: str, ending: str = "") -> str:
    """A name as a file name, which cannot leave its folder and is no other name's.

    Args:
        name: any text.
        ending: to append, such as ".png"; see `files.fit_name`.
    """
    plain = re.sub(r"[^\w.-]", "_", name).lstrip(".")
    plain = name if plain == name != "" else _mark(plain, name)
    return files.fit_name(plain, ending)


def folder_name(category: str) -> str:
    """The name of a category's folder in a work directory, unlike any file's there."""
    name = file_name(category)
    taken = name.removesuffix(".tmp") in TAKEN  # as files are called while written
    return _mark(name, category) if taken else name


def _mark(plain: str, name: str) -> str:
    return f"{plain or '_'}-{zlib.crc32(os.fsencode(name)):08x}"


def _decision_lines(
    name: str,
    row: Mapping[str, float],
    *,
    thresholds: Mapping[str, float],
    basis: Mapping[str, Any],
) -> list[str]:
    """The thresholds, what is promised of them, and what they do on the test set."""
    count = len(basis["validation_scores"])
    promised = {"image": "given by hand", "pixel": "given by hand"}
    if (asked := basis["image_fpr"]) is not None:
        expected = basis["image_fpr_expected"]
        too_few = f", too few for {100 * asked:.3g} %"
        promised["image"] = (
            f"false positives {100 * expected:.3g} % on average, below "
            f"{100 * basis['image_fpr_upper']:.3g} % with 95 % confidence, from "
            f"{count} normals{too_few if expected > asked else ''}"
        )
    if (asked := basis["pixel_fpr"]) is not None:
        error = basis["pixel_fpr_error"]
        spread = "" if error is None else f" +- {100 * error:.2g}"
        promised["pixel"] = f"false positives {100 * asked:.3g}{spread} %"
    lines = []
    for kind, text in promised.items():
        line = f"{name}, {kind} threshold {thresholds[kind]:.4g} ({text})"
        if f"{kind}_tpr" in row:
            tpr, fpr = (_percent(row[f"{kind}_{rate}"]) for rate in ("tpr", "fpr"))
            line += f": on the test set true positives {tpr}, false positives {fpr}"
        lines.append(line)
    return lines


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
