"""Keeps libraries from writing what says nothing to users."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppresses the log messages and warnings of libraries.

    After an exception Orbax's tasks stay silent for good, because they report their
    errors in threads of their own, and only when they are garbage-collected.
    """
    disabled, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    if hook is sys.__unraisablehook__:
        sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
        raise
    else:
        sys.unraisablehook = hook
    finally:
        logging.disable(disabled)
