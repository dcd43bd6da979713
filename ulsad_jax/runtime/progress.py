"""Progress bars on a terminal, plain lines elsewhere."""

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
    """A bar that appears after a second, and goes when the work is done.

    Args:
        items: to iterate over; None if the caller calls `update`.
        title: of the bar.
        total: how many items there are, if they have no length.
        unit: what the items are.
        announce: without a terminal, prints the title and the total in a line.
    """
    terminal = sys.stderr.isatty()
    if announce and not terminal:
        print(f"{title}: {total}{unit}", file=sys.stderr, flush=True)
    return tqdm(
        items, title, total, unit=unit, leave=False, disable=not terminal, delay=1
    )
