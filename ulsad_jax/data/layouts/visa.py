"""The layout of VisA.

    split_csv/1cls.csv                          object,split,label,image,mask
    <category>/Data/Images/{Normal,Anomaly}/NNN.JPG
    <category>/Data/Masks/Anomaly/NNN.png       class ids; non-zero is a defect

The CSV file gives the split. Its paths are relative to the root.
"""

from __future__ import annotations

import functools
from pathlib import Path

from ulsad_jax.data.layouts import csv_rows
from ulsad_jax.data.layouts.base import Layout
from ulsad_jax.data.records import Record
from ulsad_jax.data.unused import Places

TABLE = Path("split_csv", "1cls.csv")
CATEGORIES = (
    "candle",
    "capsules",
    "cashew",
    "chewinggum",
    "fryum",
    "macaroni1",
    "macaroni2",
    "pcb1",
    "pcb2",
    "pcb3",
    "pcb4",
    "pipe_fryum",
)


def categories(root: Path) -> list[str]:
    """Returns the categories that the CSV file lists.

    Raises:
        UserError: the CSV file is missing or malformed.
    """
    return sorted({row["object"] for row in _rows(root)})


def records(root: Path, category: str) -> list[Record]:
    """Returns one record per image of `category`.

    Raises:
        UserError: the CSV file is missing or malformed, or a file that it lists is
            missing.
    """
    rows = (row for row in _rows(root) if row["object"] == category)
    return [csv_rows.to_record(row, root) for row in rows]


def places(root: Path, category: str) -> Places:
    """Returns the places where files of `category` are searched."""
    folder = root / category / "Data"
    return Places(root, [folder], f"{TABLE} does not list such files")


def _rows(root: Path) -> list[csv_rows.Row]:
    table = root / TABLE
    status = table.stat() if table.is_file() else None
    return _read(table, status and (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=1)  # all categories read the same rows
def _read(table: Path, version: tuple[int, int] | None) -> list[csv_rows.Row]:
    del version  # part of the cache key: a changed file is read again
    return csv_rows.read_rows(table, ("object", *csv_rows.COLUMNS))


LAYOUTS = {"visa": Layout("VisA", categories, records, CATEGORIES, places)}
