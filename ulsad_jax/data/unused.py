"""Files of a category that its records leave out, which every run reports.

Otherwise an image in a wrong folder, or a mask whose name matches no image, would be
left out without notice.
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
LIMIT = 10_000  # largest number of unused files that are counted
# Files that systems, archives and the layouts themselves put beside images.
_JUNK = re.compile(
    r"\..*|(eh)?thumbs\.db|desktop\.ini|icon\r|defects_config\.json"
    r"|generator\.json|(licen[cs]e|read_?me|copying)[^.]*(\.(txt|md|rst|pdf|html))?",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Places:
    """The places where a layout searches for the files of a category.

    Attributes:
        root: folder to which reported file names are relative.
        folders: folders that hold files of this category and of no other.
        images: clause that says which images and masks are read.
        masks: path of a mask without its extension, relative to `root`, as a format
            string of `type` and `stem`. Empty if masks have no folder of their own.
        known: files that are left out on purpose.
    """

    root: Path
    folders: Sequence[Path]
    images: str
    masks: str = ""
    known: Collection[Path] = ()


def find_remarks(records: Sequence[Record], places: Places) -> list[str]:
    """Returns a sentence for each reason why files are not used.

    Also reports if training images come from several folders, which are all taken as
    normal. Only file names are read.

    Args:
        records: all records of the category.
        places: places where the category's files are searched.
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
    """Returns a clause, shared with other files, on why a file is not used."""
    if name.suffix.lower() not in IMAGE_SUFFIXES:
        return f"names of images and masks end in {', '.join(IMAGE_SUFFIXES)}"
    if masks and name.parts[0] == GROUND_TRUTH:
        return f"no anomalous test image has such a mask ({masks})"
    return places.images


def _describe_masks(records: Sequence[Record], places: Places) -> str:
    """Returns a clause with the expected name of a mask; "" if masks have no folder.

    The example is the first anomalous image without a mask, if there is one.
    """
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
    """Yields the path of each file that is not junk, and its path without links.

    Links are followed. A folder that several links lead to is visited once.
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
    """Returns the paths of files without links in their folders.

    A file that is itself a link is followed as well, and both paths are returned.
    """
    found = set()
    folders: dict[Path, str] = {}
    for path in paths:
        if path.parent not in folders:
            folders[path.parent] = os.path.realpath(path.parent)
        found.add(os.path.join(folders[path.parent], path.name))
        if path.is_symlink():
            found.add(os.path.realpath(path))
    return found
