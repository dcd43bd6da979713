"""Writes the results of a run: results.json, results.csv and scores.csv."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ulsad_jax.data.records import Record
from ulsad_jax.metrics.values import finite, mean_row
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runtime import files
from ulsad_jax.scoring import result
from ulsad_jax.scoring.prediction import Prediction

FORMAT = 1  # of results.json; raise it when its fields change


def write(
    folder: Path,
    categories: Mapping[str, Mapping[str, float]],
    about: Mapping[str, Any],
) -> None:
    """Writes results.json, and results.csv with a row of means.

    Args:
        folder: work directory.
        categories: metrics by category and name.
        about: further fields of results.json, such as selection, method and versions.
    """
    mean = mean_row(categories)
    document = {
        "format": FORMAT,
        **about,
        "categories": {name: finite(row) for name, row in categories.items()},
        "mean": finite(mean),
    }
    files.replace(folder / files_of.RESULTS, json.dumps(document, indent=2) + "\n")
    rows = [["category", "selected_on_test", *mean]]
    for name, row in [*categories.items(), ("mean", mean)]:
        values = (row.get(k, math.nan) for k in mean)
        rows.append([name, about["selected_on_test"], *values])
    files.replace_csv(folder / files_of.TABLE, rows)


def write_scores(path: Path, records: Sequence[Record], prediction: Prediction) -> None:
    """Writes a CSV file with a row per image: type, scores, decision, mask area.

    The area is in pixels at model resolution, and as a share of the image.

    Args:
        path: path of the CSV file.
        records: records of the images.
        prediction: prediction of the images, in the same order.
    """
    columns = result.columns(prediction.scores)
    rows: list[list[Any]] = [["image", "name", "type", "label", *columns]]
    for i, record in enumerate(records):
        about = [record.image, record.name, record.type, record.label]
        rows.append([*about, *result.take(prediction, i).row().values()])
    files.replace_csv(path, rows)
