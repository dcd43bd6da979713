"""How a program on a CPU holds on to its memory."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """Freed memory stays with this process, for its next allocation.

    glibc returns large blocks to the system when they are freed. XLA takes one of a
    gigabyte or more for every training step on a CPU, and the system zeroes it page by
    page each time: a sixth of a step. Call it before threads start; it does nothing
    where the C library has no such settings.
    """
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    # Blocks from the heap rather than maps of their own, and only one heap, because the
    # others are too small for them; a heap's free end is never given back.
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        set_option(option, value)
