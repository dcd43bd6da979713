"""Writing a file whole or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


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
