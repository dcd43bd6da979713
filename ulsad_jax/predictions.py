"""Predictions of files and folders of any size, written as they are made."""

from __future__ import annotations

import csv
import dataclasses
import glob
import itertools
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import Image

from ulsad_jax.data.records import IMAGE_SUFFIXES, read_image
from ulsad_jax.detector import Detector, Prepared, Result
from ulsad_jax.report import figures
from ulsad_jax.runs.results import SCORES
from ulsad_jax.runtime import files
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.progress import progress

CSV, JSON = "scores.csv", "scores.jsonl"
COLUMNS = ("image", "name", *SCORES, "width", "height", "error")
THREADS = 4  # that decode; each holds one image at its own resolution


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What to predict.

    Attributes:
        paths: files, and folders to be searched.
        root: a folder that holds all of them; results mirror the tree under it.
    """

    paths: tuple[Path, ...]
    root: Path

    def __iter__(self) -> Iterator[Path]:
        """Every image file; folders are searched as it goes, in order of names."""
        for path in self.paths:
            if path.is_dir():
                yield from _walk(path)
            else:
                yield path

    def name(self, path: Path) -> str:
        """A file's path under the root: no other file has it."""
        return os.path.relpath(os.path.abspath(path), self.root)


class Counts(NamedTuple):
    """How many images there were, of which so many anomalous or unreadable."""

    images: int
    anomalous: int
    failed: int


def find_inputs(arguments: Sequence[str]) -> Inputs:
    """Resolves what the command line names, each file once.

    Args:
        arguments: files, whatever their names; folders, searched for files with an
            image's ending, but not in hidden folders or links to folders; globs, `**`
            too, which find what a search of folders finds.

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
    """Refuses a folder for results in which something is, or would be read again.

    Raises:
        UserError: it is not empty, no folder, or inside a folder that is read.
    """
    if found := files.find_content(output):
        raise UserError(
            f"Expected --output to be a new or empty folder, found {found}. Give "
            "another."
        )
    for path in inputs.paths:
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise UserError(
                f"Expected --output outside of the folders to read, found {output} "
                f"inside {path}. Give another."
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
    """Predicts every image into a folder; what cannot be read gets an error row.

    Memory does not grow with the number of images. Pictures are at the input's own
    resolution and named like the input, with another ending appended: no two inputs
    have one.

    Args:
        detector: see `Detector.load`.
        inputs: see `find_inputs`.
        output: a new or empty folder.
        overlays: whether to write `overlays/<name>.png`.
        masks: whether to write `masks/<name>.png`, 0 or 255.
        maps: whether to write `maps/<name>.tiff`, float32.
    """
    writers = {"overlays": overlays, "masks": masks, "maps": maps}
    wanted = [kind for kind, is_wanted in writers.items() if is_wanted]
    output.mkdir(parents=True, exist_ok=True)
    total = sum(1 for _ in inputs)
    encoding = {"encoding": "utf-8", "errors": "backslashreplace"}
    anomalous = failed = 0
    with (
        (output / CSV).open("w", newline="", **encoding) as a,
        (output / JSON).open("w", **encoding) as b,
        ThreadPoolExecutor(THREADS) as pool,
        progress(None, "predicting", total=total, announce=True) as bar,
    ):
        csv.writer(a).writerow(COLUMNS)
        for batch in _batches(_prepare(detector, inputs, pool), detector.batch_size):
            good = [item for _, item in batch if isinstance(item, Prepared)]
            results = detector.predict(good) if good else iter(())
            for path, item in batch:
                row: dict[str, Any] = dict.fromkeys(COLUMNS)
                row |= {"image": os.fspath(path), "name": inputs.name(path)}
                if isinstance(item, Prepared):
                    result = next(results)
                    try:
                        _write_pictures(
                            detector, result, path, output, row["name"], wanted
                        )
                    except UserError as error:  # the file is gone by now
                        row["error"] = str(error)
                        failed += 1
                    row |= {name: getattr(result, name) for name in SCORES}
                    row |= {"height": item.size[0], "width": item.size[1]}
                    anomalous += result.is_anomalous
                else:
                    row["error"] = item
                    failed += 1
                _write_row(row, a, b)
                bar.update()
    return Counts(total, anomalous, failed)


def _expand(argument: str) -> list[Path]:
    path = Path(argument).expanduser()
    if path.exists():  # a name may hold a glob's signs
        return [path]
    found = (Path(match) for match in glob.iglob(os.fspath(path), recursive=True))
    return sorted(match for match in found if match.is_dir() or _is_image(match))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # links stay what they are called


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _is_found_in(folders: set[Path], path: Path) -> bool:
    """Whether a search of one of the folders comes upon the path."""
    if not (path in folders or _is_image(path)):
        return False
    for folder in folders.intersection(path.parents):
        parts = path.relative_to(folder).parts
        if not any(part.startswith(".") for part in parts):
            return True
    return False


def _walk(folder: Path) -> Iterator[Path]:
    """The image files under a folder, and the folders that cannot be searched."""
    refused: list[Path] = []
    for where, folders, names in os.walk(
        folder, onerror=lambda error: refused.append(Path(error.filename))
    ):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from filter(_is_image, (Path(where, name) for name in sorted(names)))
    yield from refused  # reading one fails, and becomes an error row


def _prepare(
    detector: Detector, paths: Inputs, pool: ThreadPoolExecutor
) -> Iterator[tuple[Path, Prepared | str]]:
    """Decodes a few images ahead, in order; an error is its message."""

    def prepare(path: Path) -> Prepared | str:
        try:
            return detector.prepare(path)
        except UserError as error:
            return str(error)
        except Exception as error:  # damaged files make decoders raise anything
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
) -> None:
    for kind in wanted:
        target = output / kind / f"{name}{'.tiff' if kind == 'maps' else '.png'}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if kind == "maps":
            picture = Image.fromarray(result.anomaly_map)
        elif kind == "masks":
            picture = Image.fromarray(result.mask.astype(np.uint8) * 255)
        else:
            # Read again: keeping a batch at its own resolution may fill the memory.
            low, high = detector.display_range
            drawn = figures.overlay(
                read_image(path, white_level=detector.white_level),
                result.mask,
                result.anomaly_map,
                low=low,
                high=high,
            )
            picture = Image.fromarray(drawn)
        picture.save(target)


def _write_row(row: dict[str, Any], table: TextIO, lines: TextIO) -> None:
    csv.writer(table).writerow(row.values())
    lines.write(json.dumps(row) + "\n")
    table.flush()
    lines.flush()
