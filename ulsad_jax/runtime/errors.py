"""Defines the errors that a user can correct, and how a program reports them."""

from __future__ import annotations

import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_STORAGE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the disk is read-only: give a folder elsewhere",
    errno.EACCES: "permission denied: allow it, or give a path that you may use",
    errno.EPERM: "permission denied: allow it, or give a path that you may use",
    errno.ENOTDIR: "a file where a folder should be: give a folder elsewhere",
    errno.EEXIST: "a file where a folder should be: give a folder elsewhere",
    errno.ENAMETOOLONG: "the name is too long: give a folder with a shorter one",
}
# Fields that determine the memory needed; the first two may change within a run.
_SIZES = (
    *("evaluation.batch_size", "train.feature_memory", "train.batch_size"),
    *("image_size", "trunk.image_size", "model.local_width"),
)


@contextmanager
def storage_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Converts library exceptions about storage, such as a full disk, to `OSError`.

    Args:
        path: path that the `OSError` names.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        for number in _STORAGE:
            text = os.strerror(number)
            if text in str(error):
                raise OSError(number, text, os.fspath(path)) from error
        raise


class UserError(Exception):
    """An error that the user can correct: a flag, a file or the data has to change.

    The message says what was expected, what was found, where, and what to do. The
    command-line programs print it without a traceback.
    """


def sentence(found: object) -> str:
    """Returns another program's message as a sentence, for use within a message."""
    text = str(found).rstrip(" .")
    return text if text.endswith(("?", "!")) else f"{text}."


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns a suggestion of the closest known name, or "" if none is close.

    It is the end of a message about an unknown name.
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class Diverged(UserError):
    """An error raised when training gives a loss that is not finite."""


class Interrupted(Exception):
    """An exception raised after a signal asked to stop and the state was saved."""

    def __init__(self, signum: int, step: int):
        """Composes the message.

        Args:
            signum: number of the signal.
            step: last step before the stop.
        """
        super().__init__(
            f"Stopped by {signal.Signals(signum).name} after step {step}. Everything "
            "is saved: run the same command again to go on."
        )
        self.signum = signum


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception of Python, NumPy or XLA means too little memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return told or isinstance(error, MemoryError)


def _explain_memory(error: BaseException) -> str:
    """Returns the message for an exception that means too little memory."""
    asked = re.search(r"alloc\w*:? ([\d.]+) ?([KMGTP]?i?B|bytes)\b", str(error))
    amount = "what this command needs"
    if asked:
        number, unit = asked[1].rstrip("."), asked[2]
        amount = f"{number} {unit}"
        if unit == "bytes":
            amount = f"{int(number) / 2**30:.2f} GiB"
    fields = [f"config.{name}" for name in _SIZES]
    return (
        f"error: Expected memory for {amount}, found too little. Lower "
        f"{' or '.join(fields[:2])} and run the same command again; or, with a new "
        f"--workdir where something is trained already, {', '.join(fields[2:])}."
    )


@contextmanager
def reported(
    *, stopped: str = "Stopped. Run the same command again to go on."
) -> Iterator[None]:
    """Turns expected errors into one message and an exit status.

    The status is 1 for an error, and 128 + the signal's number for an interruption.
    Unexpected errors keep their traceback.

    Args:
        stopped: message printed after Ctrl-C.
    """
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + interrupted.signum)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # XLA's threads may still compute, and could crash an orderly exit.
        os._exit(128 + signal.SIGINT)
    except (OSError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            sys.exit(_explain_memory(error))
        if not isinstance(error, OSError) or error.errno not in _STORAGE:
            raise
        sys.exit(
            "error: Expected to read or write "
            f"{error.filename or 'in --workdir and config.dataset.cache_dir'}, found: "
            f"{_STORAGE[error.errno]}, then run the same command again. What was "
            "saved before is kept."
        )
