"""Rows of a CSV file that lists images, with errors that name the cell.

The file has a header. Its columns are image, split, label and, if known, mask and
type; others are ignored.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

from ulsad_jax.data.records import (
    ANOMALOUS,
    ANOMALY,
    GOOD,
    NORMAL,
    SPLITS,
    Mask,
    Record,
)
from ulsad_jax.runtime.errors import UserError

COLUMNS = ("image", "split", "label")
LABELS = {
    "normal": NORMAL,
    "good": NORMAL,
    "0": NORMAL,
    "anomalous": ANOMALOUS,
    "anomaly": ANOMALOUS,
    "1": ANOMALOUS,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        table: the CSV file.
        number: the row's number, the header being row 1.
        cells: column to text; a column that the file lacks reads as "".
    """

    table: Path
    number: int
    cells: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells.get(column, "")

    def error(self, column: str, expected: str) -> UserError:
        """The error of a cell that holds something else than `expected`."""
        return UserError(
            f"Expected {expected} in {self.table}, row {self.number}, column "
            f"{column!r}, found {self[column]!r}. Correct that cell."
        )

    def choice(self, column: str, allowed: Collection[str]) -> str:
        """The cell's text in lower case.

        Raises:
            UserError: it is not one of `allowed`.
        """
        text = self[column].lower()
        if text not in allowed:
            raise self.error(column, f"one of {', '.join(allowed)}")
        return text

    def file(self, column: str, folder: Path) -> Path:
        """The file that the cell names, relative to `folder`.

        Raises:
            UserError: there is no such file.
        """
        path = folder / self[column]
        if not path.is_file():
            raise self.error(column, f"the name of a file (relative to {folder})")
        return path


def read_rows(table: Path, columns: Collection[str]) -> list[Row]:
    """The rows of the CSV file `table` (UTF-8, with or without byte-order mark).

    Raises:
        UserError: there is no such file; it is not UTF-8 or not CSV; it lacks one of
            `columns` or any row; a row has an empty cell there, or more cells than the
            header.
    """
    lines = _read_lines(table)
    header = [cell.strip().lower() for cell in lines[0][1]] if lines else []
    missing = [column for column in columns if column not in header]
    if missing:
        raise UserError(
            f"Expected the first row of {table} to name the columns "
            f"{', '.join(columns)}, found {', '.join(header) or 'nothing'}. Add "
            f"{', '.join(missing)}; commas separate columns."
        )
    if len(lines) == 1:
        raise UserError(
            f"Expected a row for each image in {table}, found the header alone, and no "
            "rows. Add them below it."
        )
    return [_read_row(table, *line, header, columns) for line in lines[1:]]


def _read_lines(table: Path) -> list[tuple[int, list[str]]]:
    """The (number, cells) of each row that is not blank."""
    lines = []
    number = 1
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if any(cells):
                    lines.append((number, cells))
                number = reader.line_num + 1
    except OSError as error:
        raise UserError(
            f"Expected the CSV file {table}, found no readable file "
            f"({error.strerror}). Correct the path or restore the file."
        ) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"Expected {table} to be CSV text in UTF-8, found: {error}, at or after "
            f"row {number}. Save it as 'CSV UTF-8' from the program that wrote it."
        ) from error
    return lines


def _read_row(
    table: Path,
    number: int,
    cells: list[str],
    header: list[str],
    columns: Collection[str],
) -> Row:
    if len(cells) > len(header):
        raise UserError(
            f"Expected {len(header)} cells in {table}, row {number}, as in the header, "
            f"found {len(cells)}. Put text that holds a comma between double quotes."
        )
    row = Row(table, number, dict(zip(header, map(str.strip, cells), strict=False)))
    for column in columns:
        if not row[column]:
            raise row.error(column, "some text")
    return row


def to_record(row: Row, folder: Path) -> Record:
    """The record that a row describes; its files are relative to `folder`.

    Raises:
        UserError: a split, label, type or file that cannot be.
    """
    split = row.choice("split", SPLITS)
    label = LABELS[row.choice("label", LABELS)]
    image = row.file("image", folder)
    if label == NORMAL:
        return Record(image, split)
    kind = row["type"] or ANOMALY
    if kind.lower() == GOOD or "/" in kind:
        raise row.error("type", f"a kind of anomaly (not {GOOD!r}, and without '/')")
    masks = (Mask(row.file("mask", folder)),) if row["mask"] else ()
    return Record(image, split, kind, masks)
