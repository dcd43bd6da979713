"""Files of a category that its records leave out: every run names them.

A photograph in one folder too many, or a mask whose name matches none, would
otherwise be missing without a word.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from ulsad_jax.data.folders import is_junk_folder
from ulsad_jax.data.records import ANOMALOUS, IMAGE_SUFFIXES, TEST, TRAIN, Record
from ulsad_jax.data.survey import remark

GROUND_TRUTH = "ground_truth"
LIMIT = 10_000  # files named or counted: of a folder with millions, that says enough
# What systems, archives and the layouts themselves put beside images.
_JUNK = re.compile(
    r"\..*|(eh)?thumbs\.db|desktop\.ini|icon\r|defects_config\.json"
    r"|generator\.json|(licen[cs]e|read_?me|copying)[^.]*(\.(txt|md|rst|pdf|html))?",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a layout looks for the files of a category.

    Attributes:
        root: what names of files are told from.
        folders: those that hold files of this category and of no other.
        images: a clause that says which images and masks are read.
        masks: a mask's path without its ending, from `root`, as a format string of
            `type` and `stem`. Empty: masks have no folder of their own.
        known: files that are rightly left out.
    """

    root: Path
    folders: Sequence[Path]
    images: str
    masks: str = ""
    known: Collection[Path] = ()


def find_remarks(records: Sequence[Record], places: Places) -> list[str]:
    """Returns a sentence for each reason why files are not used.

    Says, too, if several folders of training images were taken for normal ones. Reads
    names alone.

    Args:
        records: all of the category's.
        places: the category's.
    """
    used = _resolve(
        path for r in records for path in (r.image, *(mask.path for mask in r.masks))
    )
    used |= _resolve(places.known)
    masks = _describe_masks(records, places)
    reasons: dict[str, list[Path]] = {}
    unused = (path for path, real in _walk(places.folders) if real not in used)
    count = 0
    for path in itertools.islice(unused, LIMIT):
        name = path.relative_to(places.root)
        reasons.setdefault(_explain(name, places, masks), []).append(name)
        count += 1
    remarks = [remark(f"not used: {text}", names) for text, names in reasons.items()]
    if count == LIMIT:
        remarks.append(f"files not used are counted up to {LIMIT}")
    return [*remarks, *_remark_on_training(records, places.root)]


def _explain(name: Path, places: Places, masks: str) -> str:
    """Why the file is not used, in a clause that other files share."""
    if name.suffix.lower() not in IMAGE_SUFFIXES:
        return f"names of images and masks end in {', '.join(IMAGE_SUFFIXES)}"
    if masks and name.parts[0] == GROUND_TRUTH:
        return f"no anomalous test image has such a mask ({masks})"
    return places.images


def _describe_masks(records: Sequence[Record], places: Places) -> str:
    """What a mask is called: that of the first image which lacks its own."""
    type_, stem, image = "<type>", "<stem>", f"{TEST}/<type>/<stem>.<ending>"
    if not places.masks:
        return ""
    for record in records:
        if record.label == ANOMALOUS and not record.masks:
            type_, stem = record.image.parent.name, record.image.stem
            image = os.path.relpath(record.image, places.root)
            break
    mask = places.masks.format(type=type_, stem=stem)
    return f"the mask of {image} is called {mask}.<ending>"


def _remark_on_training(records: Sequence[Record], root: Path) -> list[str]:
    folders = {r.image.parent for r in records if r.split == TRAIN}
    if len(folders) < 2:
        return []
    names = ", ".join(sorted(os.path.relpath(folder, root) for folder in folders))
    return [f"training images of several folders are all taken for normal: {names}"]


def _walk(folders: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """The path of each file that is no junk, and where it lies without links.

    Links are followed; a folder that several lead to is looked at once.
    """
    seen = set()
    for folder in folders:
        for parent, inner, files in os.walk(folder, followlinks=True):
            real = os.path.realpath(parent)
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            inner[:] = sorted(name for name in inner if not is_junk_folder(name))
            for name in sorted(files):
                if not _JUNK.fullmatch(name):
                    yield Path(parent, name), os.path.join(real, name)


def _resolve(paths: Iterable[Path]) -> set[str]:
    """Where the files lie without links, and where those lie that are links."""
    found = set()
    folders: dict[Path, str] = {}
    for path in paths:
        if path.parent not in folders:
            folders[path.parent] = os.path.realpath(path.parent)
        found.add(os.path.join(folders[path.parent], path.name))
        if path.is_symlink():
            found.add(os.path.realpath(path))
    return found
