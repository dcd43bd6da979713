"""Writing a file whole or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
