"""Predicts files and folders of any size, and writes each result immediately."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import glob
import itertools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import Image

from ulsad_jax.data.records import IMAGE_SUFFIXES, read_image
from ulsad_jax.detector import Detector, Prepared
from ulsad_jax.report import figures
from ulsad_jax.runtime import files
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.progress import progress
from ulsad_jax.scoring.result import Result, columns

CSV, JSON = "scores.csv", "scores.jsonl"
THREADS = 4  # decoders; each holds one image at its own resolution
# Errors that affect a single picture: its name is too long or not allowed, or is that
# of another picture's folder. None: an error of the encoder, without a number.
OF_ONE_PICTURE = (
    *(None, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
)


class OutputTaken(UserError):
    """Error of an output folder that is not empty; no prediction has started."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Images to predict.

    Attributes:
        paths: image files, and folders to search.
        root: common parent folder; results have the same subfolders.
    """

    paths: tuple[Path, ...]
    root: Path

    def __iter__(self) -> Iterator[Path]:
        """Yields every image file; folders are searched lazily, in order of names."""
        for path in self.paths:
            if path.is_dir():
                yield from _walk(path)
            else:
                yield path

    def name(self, path: Path) -> str:
        """Returns a file's path relative to the root, which is unique."""
        return os.path.relpath(os.path.abspath(path), self.root)


class Counts(NamedTuple):
    """Numbers of all images, of anomalous ones, and of images with an error."""

    images: int
    anomalous: int
    failed: int


def find_inputs(arguments: Sequence[str]) -> Inputs:
    """Resolves the inputs of the command line, with each file once.

    Args:
        arguments: files, folders and globs. A file may have any name. A folder is
            searched for files with an image's suffix; links to folders are followed
            unless they form a cycle, and hidden folders are skipped. A glob, in which
            `**` is allowed, finds what a search of folders finds.

    Raises:
        UserError: an argument without any image.
    """
    paths: dict[Path, Path] = {}
    for argument in arguments:
        found = _expand(argument)
        for path in found:
            paths.setdefault(_absolute(path), path)
        if not any(True for _ in Inputs(tuple(found), Path())):
            raise UserError(
                f"Expected an image file, a folder or a glob with some, found none at "
                f"{argument}. Image files end in {', '.join(IMAGE_SUFFIXES)}."
            )
    folders = {path for path in paths if path.is_dir()}
    kept = {p: given for p, given in paths.items() if not _is_found_in(folders, p)}
    roots = [path if path in folders else path.parent for path in kept]
    return Inputs(tuple(kept.values()), Path(os.path.commonpath(roots)))


def check_output(output: Path, inputs: Inputs) -> None:
    """Rejects an output folder that is not empty, or lies inside an input folder.

    Raises:
        OutputTaken: it is not empty, or not a folder.
        UserError: it lies inside a folder that is read.
    """
    if found := files.find_content(output):
        raise OutputTaken(
            f"Expected --output to be a new or empty folder, found {found}. Give "
            "another."
        )
    target = output.resolve()
    for path in inputs.paths:
        for folder, _ in _search(path):
            if target.is_relative_to(folder.resolve()):
                raise UserError(
                    f"Expected --output outside of the folders to read, found "
                    f"{output} inside {folder}. Give another."
                )


def predict_files(
    detector: Detector,
    inputs: Inputs,
    output: Path,
    *,
    overlays: bool = False,
    masks: bool = False,
    maps: bool = False,
) -> Counts:
    """Predicts every image into a folder; images that cannot be read get an error row.

    Memory does not grow with the number of images. Pictures have the resolution of the
    input. Their name is the input's name with another suffix appended, shortened if
    necessary (see `files.fit_name`), so that no two inputs share a picture. A picture
    that cannot be written causes an error row; an error that affects all of them, such
    as a full disk, stops the prediction.

    Args:
        detector: trained category, see `Detector.load`.
        inputs: images to predict, see `find_inputs`.
        output: a new or empty folder.
        overlays: True to write `overlays/<name>.png`.
        masks: True to write `masks/<name>.png`, with values 0 or 255.
        maps: True to write `maps/<name>.tiff`, float32.

    Raises:
        OutputTaken: another prediction has started in the folder.
        OSError: an error that affects all output, such as a full disk.
    """
    writers = {"overlays": overlays, "masks": masks, "maps": maps}
    wanted = [kind for kind, is_wanted in writers.items() if is_wanted]
    header = ("image", "name", *columns(detector.names), "width", "height", "error")
    total = sum(1 for _ in inputs)
    anomalous = failed = 0
    with (
        _claim(output, header) as tables,
        ThreadPoolExecutor(THREADS) as pool,
        progress(None, "predicting", total=total, announce=True) as bar,
    ):
        for batch in _batches(_prepare(detector, inputs, pool), detector.batch_size):
            good = [item for _, item in batch if isinstance(item, Prepared)]
            results = detector.predict(good, with_maps=False) if good else iter(())
            for path, item in batch:
                row: dict[str, Any] = dict.fromkeys(header)
                row |= {"image": os.fspath(path), "name": inputs.name(path)}
                if isinstance(item, Prepared):
                    result = next(results)
                    row |= result.row()
                    row |= {"height": item.size[0], "width": item.size[1]}
                    row["error"] = _write_pictures(
                        detector, result, path, output, row["name"], wanted
                    )
                    anomalous += result.is_anomalous
                else:
                    row["error"] = item
                failed += row["error"] is not None
                _write_row(row, *tables)
                bar.update()
    return Counts(total, anomalous, failed)


@contextlib.contextmanager
def _claim(output: Path, header: Sequence[str]) -> Iterator[tuple[TextIO, TextIO]]:
    """Creates both tables in a folder; fails if another prediction has created them."""
    output.mkdir(parents=True, exist_ok=True)
    encoding = {"encoding": "utf-8", "errors": "backslashreplace"}
    try:
        table = (output / CSV).open("x", newline="", **encoding)
    except FileExistsError as error:
        raise OutputTaken(
            "Expected --output to be a new or empty folder, found the rows of another "
            f"prediction in {output}. Give another."
        ) from error
    with table, (output / JSON).open("x", **encoding) as lines:
        csv.writer(table).writerow(header)
        yield table, lines


def _expand(argument: str) -> list[Path]:
    path = Path(argument).expanduser()
    if path.exists():  # a file's name may contain *, ? or [
        return [path]
    return sorted(m for m in _match(path) if m.is_dir() or _is_image(m))


def _match(pattern: Path) -> set[Path]:
    """Returns the paths that match a glob; `**` matches folders without link cycles."""
    parts = pattern.parts
    if "**" not in parts:
        return {Path(found) for found in glob.iglob(os.fspath(pattern))}
    k = parts.index("**")
    starts = _match(Path(*parts[:k])) if k else {Path()}
    if k == len(parts) - 1:
        return {start for start in starts if start.is_dir()}
    folders = (Path(glob.escape(str(f))) for s in starts for f, _ in _search(s))
    return {m for folder in folders for m in _match(folder.joinpath(*parts[k + 1 :]))}


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # does not resolve links


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _is_found_in(folders: set[Path], path: Path) -> bool:
    """Returns whether a search of one of the folders finds the path."""
    if not (path in folders or _is_image(path)):
        return False
    for folder in folders.intersection(path.parents):
        parts = path.relative_to(folder).parts
        if not any(part.startswith(".") for part in parts):
            return True
    return False


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the image files under a folder, then folders that cannot be read."""
    refused: list[Path] = []
    for where, names in _search(folder, refused):
        yield from filter(_is_image, (where / name for name in names))
    yield from refused  # reading one fails and gives an error row


def _search(
    folder: Path, refused: list[Path] | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """Walks through a folder and its subfolders; skips hidden ones and follows links.

    Args:
        folder: folder to search; a path that is not a folder yields nothing.
        refused: list to which folders that cannot be searched are appended.

    Yields:
        A folder and the sorted names of its files.
    """

    def refuse(error: OSError) -> None:
        if refused is not None:
            refused.append(Path(error.filename))

    for text, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        where = Path(text)
        above = {os.path.realpath(f) for f in _between(folder, where)}
        folders[:] = sorted(
            name
            for name in folders
            # A link to a parent folder would be followed without end.
            if not name.startswith(".") and os.path.realpath(where / name) not in above
        )
        yield where, sorted(names)


def _between(first: Path, last: Path) -> Iterable[Path]:
    """Returns `last` and its parent folders, up to and including `first`."""
    count = len(last.parts) - len(first.parts)
    return (last, *last.parents[:count])


def _prepare(
    detector: Detector, paths: Inputs, pool: ThreadPoolExecutor
) -> Iterator[tuple[Path, Prepared | str]]:
    """Decodes a few images ahead, in order; yields a message for a bad image."""

    def prepare(path: Path) -> Prepared | str:
        try:
            return detector.prepare(path)
        except UserError as error:
            return str(error)
        except Exception as error:  # decoders raise any error for damaged files
            return f"{type(error).__name__}: {error}"

    pending: deque[tuple[Path, Future]] = deque()
    for path in paths:
        pending.append((path, pool.submit(prepare, path)))
        if len(pending) > detector.batch_size + THREADS:
            path, future = pending.popleft()
            yield path, future.result()
    while pending:
        path, future = pending.popleft()
        yield path, future.result()


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _write_pictures(
    detector: Detector,
    result: Result,
    path: Path,
    output: Path,
    name: str,
    wanted: Sequence[str],
) -> str | None:
    """Writes the pictures of an image; returns an error message, or None.

    Raises:
        OSError: an error that prevents all pictures from being written, such as a full
            disk.
    """
    for kind in wanted:
        ending = ".tiff" if kind == "maps" else ".png"
        target = output / kind / Path(name)
        target = target.with_name(files.fit_name(target.name, ending))
        try:
            picture = _draw(kind, detector, result, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
        except UserError as error:  # the file was removed or replaced meanwhile
            return str(error)
        except OSError as error:
            if error.errno not in OF_ONE_PICTURE:
                error.filename = error.filename or os.fspath(target)
                raise
            return (
                f"Expected to write {target}, found: {error.strerror or error}. The "
                "scores are right."
            )
    return None


def _draw(kind: str, detector: Detector, result: Result, path: Path) -> Image.Image:
    """Returns the overlay, mask or map of an image as a picture."""
    if kind == "maps":
        return Image.fromarray(result.anomaly_map)
    if kind == "masks":
        return Image.fromarray(result.mask.astype(np.uint8) * 255)
    # Read again, because a batch at original resolution may not fit in memory.
    low, high = detector.display_range
    pixels = read_image(path, white_level=detector.white_level)
    if pixels.shape[:2] != result.mask.shape:
        raise UserError(
            f"Expected {path} to stay as it was, found an image of another size there "
            "now. Predict it again."
        )
    drawn = figures.overlay(pixels, result.mask, result.anomaly_map, low=low, high=high)
    return Image.fromarray(drawn)


def _write_row(row: dict[str, Any], table: TextIO, lines: TextIO) -> None:
    csv.writer(table).writerow(row.values())
    lines.write(json.dumps(row) + "\n")
    table.flush()
    lines.flush()
