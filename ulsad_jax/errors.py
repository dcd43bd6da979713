"""The error that a user can act on."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program has to change: a flag, a file, the data.

    The message says what was expected, what was found, where, and what to do. The
    command-line programs print it without a traceback.
    """
