"""Reads nested mappings, such as configs, as fields with paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the fields of a tree as (path, value), with a list as a tuple.

    Args:
        tree: mapping or ConfigDict.
        prefix: text before every path; names within a path are joined with dots.
    """
    for name, value in tree.items():
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, tuple(value) if isinstance(value, list) else value


class Fields(dict):
    """A nested mapping whose fields are also attributes, as in a ConfigDict."""

    def __getattr__(self, name: str) -> Any:
        """Returns a field, with a mapping as `Fields`."""
        try:
            value = self[name]
        except KeyError as error:
            raise AttributeError(name) from error
        return Fields(value) if isinstance(value, dict) else value
