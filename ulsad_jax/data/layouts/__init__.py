"""The known data sets and how to find the records of one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ulsad_jax.data.layouts import (
    btad,
    folder,
    magnetic_tile,
    mvtec_ad,
    mvtec_loco,
    table,
    visa,
)
from ulsad_jax.data.records import Record, check
from ulsad_jax.data.unused import find_remarks
from ulsad_jax.runtime.errors import UserError

LAYOUTS: dict[str, ModuleType] = {
    "mvtec_ad": mvtec_ad,
    "mvtec_loco": mvtec_loco,
    "btad": btad,
    "mpdd": mvtec_ad,
    "visa": visa,
    "magnetic_tile": magnetic_tile,
    "folder": folder,
    "table": table,
    "synthetic": mvtec_loco,
}


def find_categories(name: str, root: Path) -> list[str]:
    """The categories of data set `name` under `root`.

    Args:
        name: a key of `LAYOUTS`.
        root: the folder that the data set was unpacked to; for "table", a CSV file.

    Raises:
        UserError: an unknown data set, no data at `root`, or data of another layout.
    """
    if name not in LAYOUTS:
        raise UserError(
            f"Expected a data set among {', '.join(LAYOUTS)}, found {name!r}. Correct "
            "the name, or use 'folder' or 'table' for your own images."
        )
    is_table = LAYOUTS[name] is table
    with _readable(root):
        is_there = root.is_file() if is_table else root.is_dir()
    if not is_there:
        found = "something else" if root.exists() else "nothing there"
        raise UserError(
            f"Expected the data root of {name!r} to be a "
            f"{'CSV file' if is_table else 'folder'}, found {found}: {root}. Correct "
            "the path, or get the data (README, section Real data)."
        )
    with _readable(root):
        found = LAYOUTS[name].categories(root)
    if not found:
        raise UserError(
            f"Expected categories of {name!r} in {root}, found none. Give the folder "
            "that holds the categories' folders, unpacked (README, section Real data)."
        )
    return found


def select_categories(name: str, root: Path, wanted: Sequence[str]) -> list[str]:
    """The wanted categories, each once; all that are found for ["all"].

    Raises:
        UserError: what `find_categories` raises, or an unknown category.
    """
    known = find_categories(name, root)
    if list(wanted) == ["all"]:
        return known
    for category in wanted:
        if category not in known:
            raise UserError(
                f"Expected a category of {name!r} found in {root} "
                f"({', '.join(known)}), found {category!r}. Correct the name, or "
                "unpack that category there."
            )
    return list(dict.fromkeys(wanted))


def find_records(name: str, root: Path, category: str) -> list[Record]:
    """The checked records of one category, in a fixed order.

    Args:
        name: a key of `LAYOUTS`.
        root: the folder that the data set was unpacked to; for "table", a CSV file.
        category: one of `find_categories(name, root)`.

    Raises:
        UserError: what `find_categories` raises, an unknown category, or data that
            cannot be trained on.
    """
    select_categories(name, root, [category])
    with _readable(root):
        records = LAYOUTS[name].records(root, category)
    return check(records, root)


@contextlib.contextmanager
def _readable(root: Path) -> Iterator[None]:
    """Names the file or folder of the data that may not be read."""
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"Expected data that may be read, found {error.filename or root}: "
            "permission denied. Allow it to be read, or remove it from the data."
        ) from error


def describe_unused(
    name: str, root: Path, category: str, records: Sequence[Record]
) -> list[str]:
    """Returns a sentence for each reason why files of a category are not used.

    Args:
        name: a key of `LAYOUTS`.
        root: the folder that the data set was unpacked to; for "table", a CSV file.
        category: the category.
        records: what `find_records` gave.
    """
    places = LAYOUTS[name].places(root, category)
    return find_remarks(records, places) if places else []
