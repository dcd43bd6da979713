"""Warnings about a file's content, with the file's name.

Decoders warn about a broken EXIF block or a very large number of pixels, but do not
know the file's name.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

# Python shows each text once, but the same fault in another file is a new warning. The
# filter is appended, so that the user's filters take precedence.
warnings.filterwarnings("always", module=r"PIL\.", append=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds a file's name to the warnings raised while it is read.

    Calls may be nested; the outermost one adds its name.
    """
    if _CATCHER.reader.caught is not None:
        yield
        return
    with _CATCHER.catch() as caught:
        yield
    for text, category in dict.fromkeys(caught):
        warnings.warn(f"{os.fspath(path)}: {text}", category, stacklevel=3)


@contextlib.contextmanager
def said_before() -> Iterator[None]:
    """Drops the warnings raised while a file is read again.

    They were shown when the file was first read, under `naming`.
    """
    with _CATCHER.catch():
        yield


class _Reader(threading.local):
    """The warnings caught in one thread.

    Attributes:
        caught: (text, category) of each warning about the file being read; None if the
            thread reads no file.
    """

    caught: list[tuple[str, type[Warning]]] | None = None


class _Catcher:
    """Catches the warnings of threads that read files, and passes on all others.

    `warnings.catch_warnings` is not thread-safe: threads undo each other's changes.
    """

    def __init__(self):
        self.reader = _Reader()
        self._lock = threading.Lock()
        self._readers = 0
        self._show = warnings.showwarning

    @contextlib.contextmanager
    def catch(self) -> Iterator[list[tuple[str, type[Warning]]]]:
        """Yields a list that collects the warnings of this thread."""
        before, self.reader.caught = self.reader.caught, []
        with self._lock:
            self._readers += 1
            if warnings.showwarning != self._take:
                self._show = warnings.showwarning
                warnings.showwarning = self._take
        try:
            yield self.reader.caught
        finally:
            self.reader.caught = before
            with self._lock:
                self._readers -= 1
                if not self._readers and warnings.showwarning == self._take:
                    warnings.showwarning = self._show

    def _take(
        self, message: Warning, category: type[Warning], *args: Any, **kwargs: Any
    ) -> None:
        if self.reader.caught is None:
            self._show(message, category, *args, **kwargs)
        else:
            self.reader.caught.append((str(message), category))


_CATCHER = _Catcher()
