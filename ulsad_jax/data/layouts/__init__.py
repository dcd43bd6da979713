"""The known data sets, and functions that find their records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ulsad_jax.data.layouts.base import Layout
from ulsad_jax.data.records import Record, check
from ulsad_jax.data.unused import find_remarks
from ulsad_jax.runtime import registry
from ulsad_jax.runtime.errors import UserError


def known_layouts() -> dict[str, Layout]:
    """Returns the built-in layouts by name."""
    return dict(registry.collect("ulsad_jax.data.layouts", "LAYOUTS"))


def find(name: str) -> Layout:
    """Returns the layout that `config.dataset.name` names.

    Raises:
        UserError: there is no such layout.
    """
    return registry.find(name, known_layouts(), field="config.dataset.name")


def find_categories(name: str, root: Path) -> list[str]:
    """Returns the names of the categories of a data set.

    Args:
        name: name of a built-in layout, or "module:attribute".
        root: folder to which the data set was unpacked; for "table", a CSV file.

    Raises:
        UserError: the data set is unknown, there are no data at `root`, or they have
            another layout.
    """
    layout = find(name)
    with _readable(root):
        is_there = root.is_file() if layout.root_is_file else root.is_dir()
    if not is_there:
        found = "something else" if root.exists() else "nothing there"
        raise UserError(
            f"Expected the data root of {name!r} to be a "
            f"{'file' if layout.root_is_file else 'folder'}, found {found}: {root}. "
            "Correct the path, or get the data (docs/data.md)."
        )
    with _readable(root):
        found = layout.categories(root)
    if not found:
        raise UserError(
            f"Expected categories of {name!r} in {root}, found none. Give the folder "
            "that holds the categories' folders, unpacked (docs/data.md)."
        )
    return found


def select_categories(name: str, root: Path, wanted: Sequence[str]) -> list[str]:
    """Returns the wanted categories, each once; all existing ones for ["all"].

    Args:
        name: name of a built-in layout, or "module:attribute".
        root: folder to which the data set was unpacked; for "table", a CSV file.
        wanted: names of categories, or ["all"].

    Raises:
        UserError: `find_categories` fails, or a category is unknown.
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
    """Returns the checked records of one category, in a fixed order.

    Args:
        name: name of a built-in layout, or "module:attribute".
        root: folder to which the data set was unpacked; for "table", a CSV file.
        category: name of a category found by `find_categories(name, root)`.

    Raises:
        UserError: `find_categories` fails, the category is unknown, or its data cannot
            be used for training.
    """
    select_categories(name, root, [category])
    with _readable(root):
        records = find(name).records(root, category)
    return check(records, root)


@contextlib.contextmanager
def _readable(root: Path) -> Iterator[None]:
    """Turns a permission error into a `UserError` that names the file or folder."""
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
        name: name of a built-in layout, or "module:attribute".
        root: folder to which the data set was unpacked; for "table", a CSV file.
        category: name of the category.
        records: records returned by `find_records`.
    """
    places = find(name).places
    return find_remarks(records, places(root, category)) if places else []
