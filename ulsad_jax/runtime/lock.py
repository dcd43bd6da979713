"""Locks work directories, so that one command at a time writes to each."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ulsad_jax.runtime import files, hosts
from ulsad_jax.runtime.errors import UserError

# Errors of file systems without locks, or with their lock service switched off.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Locks a work directory, so that no other command writes to it.

    The operating system releases the lock when the process ends, in whatever way. Of
    the processes of one run only the first takes the lock. A missing folder is created,
    and removed again if it stays empty. If the file system has no locks, a message says
    so, and the command continues.

    Args:
        workdir: folder of the work directory.

    Raises:
        UserError: another command holds the lock; the message names its process.
        OSError: the folder cannot be written to.
    """
    if not hosts.is_first():
        yield
        return
    made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    path = workdir / files.LOCK
    try:
        while (file := _take(path)) is None:
            pass  # the previous holder has just removed it
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while this process holds it
            os.close(file)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _take(path: Path) -> int | None:
    """Opens and locks the lock file, and writes this process's name into it.

    Returns:
        The file descriptor; None if the previous holder has removed the file or its
        folder since it was opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        # mkdir looks twice; another command may remove the folder in between.
        if os.path.lexists(error.filename) and not os.path.isdir(error.filename):
            raise
        return None
    with contextlib.ExitStack() as stack:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, file)
            _lock(file, path)
            if not os.path.samestat(os.fstat(file), path.stat()):
                return None
        except FileNotFoundError:
            return None
        os.ftruncate(file, 0)
        os.write(file, _describe_self().encode())
        stack.pop_all()
        return file


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            print(
                f"The file system of {path.parent} has no locks: see to it that no "
                "other command writes there meanwhile."
            )
            return
        if not isinstance(error, BlockingIOError):
            raise
        raise UserError(
            f"Expected {path.parent} to be used by one command at a time, found "
            f"{_describe_holder(path)} at work in it. Wait until it has ended, or give "
            "another --workdir."
        ) from error


def _describe_self() -> str:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    about = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    return json.dumps(about) + "\n"


def _describe_holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text())
        return "process {process} on {host}, since {since},".format(**about)
    except (OSError, ValueError, KeyError):  # its holder is just starting or ending
        return "another process"
