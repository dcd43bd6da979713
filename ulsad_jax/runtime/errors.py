"""The errors that a user can act on, and how a program reports them."""

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
# What decides how much memory is needed; the first two may change within a run.
_SIZES = (
    *("evaluation.batch_size", "train.feature_memory", "train.batch_size"),
    *("image_size", "model.local_width"),
)


@contextmanager
def storage_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what libraries make of a full disk back into an `OSError` at `path`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        for number in _STORAGE:
            text = os.strerror(number)
            if text in str(error):
                raise OSError(number, text, os.fspath(path)) from error
        raise


class UserError(Exception):
    """Something outside the program has to change: a flag, a file, the data.

    The message says what was expected, what was found, where, and what to do. The
    command-line programs print it without a traceback.
    """


def sentence(found: object) -> str:
    """What another program said, within a message: it ends with one mark."""
    text = str(found).rstrip(" .")
    return text if text.endswith(("?", "!")) else f"{text}."


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, if any."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class Diverged(UserError):
    """Training gave a loss that is not finite."""


class Interrupted(Exception):
    """A signal asked to stop, and the state is saved."""

    def __init__(self, signum: int, step: int):
        """Says by which signal and after which step."""
        super().__init__(
            f"Stopped by {signal.Signals(signum).name} after step {step}. Everything "
            "is saved: run the same command again to go on."
        )
        self.signum = signum


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether it is what Python, NumPy or XLA raise where memory is short."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return told or isinstance(error, MemoryError)


def _explain_memory(error: BaseException) -> str:
    """Returns what to tell about memory that does not suffice."""
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
    """Turns foreseeable errors into one message and an exit status.

    1 for an error, 128 + the signal's number when interrupted; anything unforeseen
    keeps its traceback.

    Args:
        stopped: what to say after Ctrl-C.
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
        # At once: XLA's threads may still compute, and crash a program that tidies up.
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
