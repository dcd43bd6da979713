"""Makes file names, and writes files atomically."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LONGEST_NAME = 255  # bytes, the limit of common file systems


def fit_name(stem: str, ending: str = "") -> str:
    """Returns the file name `stem + ending`, shortened if it is too long.

    A name of more than 255 bytes is cut between two characters. A hash of the whole
    stem is added, so that two long names stay different.
    """
    if len(os.fsencode(stem + ending)) <= LONGEST_NAME:
        return stem + ending
    end = f"-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]}{ending}"
    while len(os.fsencode(stem + end)) > LONGEST_NAME:
        stem = stem[:-1]
    return stem + end


LOCK = ".lock"  # in a work directory while a command writes to it; see `lock.hold`


def safe_name(name: str, ending: str = "") -> str:
    """Returns a unique file name that cannot leave its folder.

    Args:
        name: any text; different texts give different file names.
        ending: text to append, such as ".png"; see `fit_name`.
    """
    plain = re.sub(r"[^\w.-]", "_", name).lstrip(".")
    return fit_name(name if plain == name != "" else mark(plain, name), ending)


def mark(plain: str, name: str) -> str:
    """Returns `plain` with a checksum of `name` appended."""
    return f"{plain or '_'}-{zlib.crc32(os.fsencode(name)):08x}"


def find_content(path: Path) -> str:
    """Returns a description of a path's content for a message; "" if it has none.

    A folder that is empty or holds only the lock file has no content.
    """
    if not path.exists():
        return ""
    if path.is_dir() and all(inside.name == LOCK for inside in path.iterdir()):
        return ""
    return f"{'other files in' if path.is_dir() else 'a file at'} {path}"


def replace(path: Path, content: str | bytes) -> None:
    """Replaces the content of a file; if writing fails, the old content is kept."""
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
    """Replaces the content of a CSV file, in UTF-8, as `replace` does."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    replace(path, text.getvalue())
