"""Warnings about a file's content, with the file's name.

Decoders warn of a broken EXIF block or of very many pixels, and do not know the file.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

# Python shows a text once; the same fault of the next file is another one. Appended, so
# that whatever filter the user sets comes first.
warnings.filterwarnings("always", module=r"PIL\.", append=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds a file's name to the warnings that reading it gives; may be nested."""
    if _CATCHER.reader.caught is not None:
        yield
        return
    with _CATCHER.catch() as caught:
        yield
    for text, category in dict.fromkeys(caught):
        warnings.warn(f"{os.fspath(path)}: {text}", category, stacklevel=3)


@contextlib.contextmanager
def said_before() -> Iterator[None]:
    """Drops the warnings of reading again what was read under `naming`."""
    with _CATCHER.catch():
        yield


class _Reader(threading.local):
    """What a thread reads.

    Attributes:
        caught: (text, category) of the warnings about it; None if it reads nothing.
    """

    caught: list[tuple[str, type[Warning]]] | None = None


class _Catcher:
    """Takes the warnings of threads that read, and passes on those of others.

    `warnings.catch_warnings` is not for threads: they undo each other's.
    """

    def __init__(self):
        self.reader = _Reader()
        self._lock = threading.Lock()
        self._readers = 0
        self._show = warnings.showwarning

    @contextlib.contextmanager
    def catch(self) -> Iterator[list[tuple[str, type[Warning]]]]:
        """Takes the warnings of this thread into the list that it gives."""
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
