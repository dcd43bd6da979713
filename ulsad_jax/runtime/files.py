"""Names of files, and writing a file whole or not at all."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LONGEST_NAME = 255  # bytes, of what file systems take


def fit_name(stem: str, ending: str = "") -> str:
    """Returns a file's name, `stem` and `ending`, that a file system takes.

    What is longer than 255 bytes is cut between two characters; a hash of the whole
    stem keeps two long names apart.
    """
    if len(os.fsencode(stem + ending)) <= LONGEST_NAME:
        return stem + ending
    end = f"-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]}{ending}"
    while len(os.fsencode(stem + end)) > LONGEST_NAME:
        stem = stem[:-1]
    return stem + end


LOCK = ".lock"  # in a work directory while a command writes to it; see `lock.hold`


def find_content(path: Path) -> str:
    """What makes a folder neither new nor empty, for a message; "" if it is either."""
    if not path.exists():
        return ""
    if path.is_dir() and all(inside.name == LOCK for inside in path.iterdir()):
        return ""
    return f"{'other files in' if path.is_dir() else 'a file at'} {path}"


def replace(path: Path, content: str | bytes) -> None:
    """Writes a file anew; whatever goes wrong, what was there before is kept."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # a full disk needs the space
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def replace_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file anew, in UTF-8, as `replace` does."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    replace(path, text.getvalue())
