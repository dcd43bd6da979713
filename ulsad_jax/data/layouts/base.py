"""The definition of a layout, which turns a data set's folder into records.

A module of this package offers its layouts by name; there is no other list of them:

    LAYOUTS = {"mvtec_ad": Layout("MVTec AD", categories, records, CATEGORIES)}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ulsad_jax.data.records import Record
from ulsad_jax.data.unused import Places


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout of images on disk, given by names and small text files alone.

    Attributes:
        title: human-readable name of the data set.
        categories: function that returns the categories found at a root.
        records: function of (root, category) that returns one record per image.
        published: names of the categories that the data set is published with; other
            categories are accepted, too.
        places: function of (root, category) that returns the places where files are
            searched, used to report unused files; None if the layout has no folder of
            its own.
        root_is_file: True if the root is a file, such as a CSV file, and not a folder.
        has_saturation: True if ground-truth channels have saturation thresholds.
            AU-sPRO and the mean over types of anomalies are then the data set's own
            metrics.
    """

    title: str
    categories: Callable[[Path], list[str]]
    records: Callable[[Path, str], list[Record]]
    published: tuple[str, ...] = ()
    places: Callable[[Path, str], Places] | None = None
    root_is_file: bool = False
    has_saturation: bool = False
