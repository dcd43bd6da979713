"""A user's images listed in a CSV file: image, split, label [, mask] [, type].

Paths are relative to the CSV file. A label is normal (good, 0) or anomalous
(anomaly, 1). The type of an anomalous image is "anomaly" where none is given.
"""

from __future__ import annotations

from pathlib import Path

from ulsad_jax.data.layouts import csv_rows
from ulsad_jax.data.records import Record


def categories(root: Path) -> list[str]:
    """The one category: the CSV file's name without its ending."""
    return [root.stem]


def records(root: Path, category: str) -> list[Record]:
    """One record a row.

    Raises:
        UserError: the CSV file is malformed, or a file it lists is missing.
    """
    rows = csv_rows.read_rows(root, csv_rows.COLUMNS)
    return [csv_rows.to_record(row, root.parent) for row in rows]


def places(root: Path, category: str) -> None:
    """Returns None: no folder is the table's own."""
