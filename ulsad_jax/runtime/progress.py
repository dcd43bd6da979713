"""Shows progress bars on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    items: Iterable[Any] | None,
    title: str,
    *,
    total: int | None = None,
    unit: str = " images",
    announce: bool = False,
) -> tqdm:
    """Returns a bar that appears after a second and disappears at the end of the work.

    Args:
        items: items to iterate over; None if the caller calls `update`.
        title: title of the bar.
        total: number of items, if they have no length.
        unit: unit of the items, with a space before it.
        announce: True to print the title and the total in a line if there is no
            terminal.
    """
    terminal = sys.stderr.isatty()
    if announce and not terminal:
        print(f"{title}: {total}{unit}", file=sys.stderr, flush=True)
    return tqdm(
        items, title, total, unit=unit, leave=False, disable=not terminal, delay=1
    )
