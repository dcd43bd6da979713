"""The layout of images listed in a CSV file: image, split, label [, mask] [, type].

Paths are relative to the CSV file. A label is normal (good, 0) or anomalous (anomaly,
1). The type of an anomalous image is "anomaly" if none is given.
"""

from __future__ import annotations

from pathlib import Path

from ulsad_jax.data.layouts import csv_rows
from ulsad_jax.data.layouts.base import Layout
from ulsad_jax.data.records import Record


def categories(root: Path) -> list[str]:
    """Returns the only category, named after the CSV file without its extension."""
    return [root.stem]


def records(root: Path, category: str) -> list[Record]:
    """Returns one record per row.

    Raises:
        UserError: the CSV file is malformed, or a file that it lists is missing.
    """
    rows = csv_rows.read_rows(root, csv_rows.COLUMNS)
    return [csv_rows.to_record(row, root.parent) for row in rows]


LAYOUTS = {"table": Layout("A table of images", categories, records, root_is_file=True)}
