"""VisA.

    split_csv/1cls.csv                          object,split,label,image,mask
    <category>/Data/Images/{Normal,Anomaly}/NNN.JPG
    <category>/Data/Masks/Anomaly/NNN.png       class ids: any non-zero is a defect

The CSV file says what is trained on; its paths are relative to the root.
"""

from __future__ import annotations

from pathlib import Path

from ulsad_jax.data.layouts import csv_rows
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
    """The categories that the CSV file lists.

    Raises:
        UserError: the CSV file is missing or malformed.
    """
    return sorted({row["object"] for row in _rows(root)})


def records(root: Path, category: str) -> list[Record]:
    """One record an image of `category`.

    Raises:
        UserError: the CSV file is missing or malformed, or a file it lists is missing.
    """
    rows = (row for row in _rows(root) if row["object"] == category)
    return [csv_rows.to_record(row, root) for row in rows]


def places(root: Path, category: str) -> Places:
    """Returns where files of `category` are looked for."""
    folder = root / category / "Data"
    return Places(root, [folder], f"{TABLE} does not list such files")


def _rows(root: Path) -> list[csv_rows.Row]:
    return csv_rows.read_rows(root / TABLE, ("object", *csv_rows.COLUMNS))
