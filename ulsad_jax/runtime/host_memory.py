"""Configures how a program on a CPU reuses its memory."""

from __future__ import annotations

import ctypes
import sys

# Constants of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """Keeps freed memory in this process, for its next allocation.

    glibc returns large blocks to the system when they are freed. XLA allocates one of a
    gigabyte or more for every training step on a CPU, and the system zeroes it page by
    page each time, which takes a sixth of a step. Call this before threads start. It
    does nothing if the C library has no such settings.
    """
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    # Takes blocks from the heap instead of separate maps, uses only one heap, because
    # the others are too small, and never returns the heap's free end.
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        set_option(option, value)
