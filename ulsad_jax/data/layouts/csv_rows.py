"""Rows of a CSV file that lists images, with errors that name the cell.

The file has a header. Its columns are image, split, label and, if known, mask and type.
Other columns are ignored.
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
    """A row of a CSV file.

    Attributes:
        table: path of the CSV file.
        number: number of the row; the header is row 1.
        cells: text of each cell, by column name. A column that the file lacks reads as
            "".
    """

    table: Path
    number: int
    cells: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells.get(column, "")

    def error(self, column: str, expected: str) -> UserError:
        """Returns the error for a cell that does not hold what is expected."""
        return UserError(
            f"Expected {expected} in {self.table}, row {self.number}, column "
            f"{column!r}, found {self[column]!r}. Correct that cell."
        )

    def choice(self, column: str, allowed: Collection[str]) -> str:
        """Returns the cell's text in lower case.

        Raises:
            UserError: the text is not one of `allowed`.
        """
        text = self[column].lower()
        if text not in allowed:
            raise self.error(column, f"one of {', '.join(allowed)}")
        return text

    def file(self, column: str, folder: Path) -> Path:
        """Returns the path of the file that the cell names, relative to `folder`.

        Raises:
            UserError: there is no such file.
        """
        path = folder / self[column]
        if not path.is_file():
            raise self.error(column, f"the name of a file (relative to {folder})")
        return path


def read_rows(table: Path, columns: Collection[str]) -> list[Row]:
    """Reads the rows of a CSV file (UTF-8, with or without byte-order mark).

    Args:
        table: path of the CSV file.
        columns: names of the columns in which every row needs a value.

    Raises:
        UserError: the file does not exist, is not UTF-8, is not CSV, lacks one of
            `columns` or has no rows; or a row has an empty cell in `columns`, or more
            cells than the header.
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
    """Reads the (number, cells) of each row that is not blank."""
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
    """Returns the record that a row describes; its files are relative to `folder`.

    Raises:
        UserError: a split, label or type is invalid, or a file does not exist.
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
