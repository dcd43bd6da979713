"""One command at a time writes to a work directory."""

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

# What file systems without locks say, and network ones whose lock service is off.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other commands from writing to a work directory, or is kept from it.

    The operating system drops the lock with the process, however that ends. Of the
    processes of one run the first one alone takes it. A folder that is not there is
    made, and removed if nothing comes into it. Where the file system has no locks,
    that is said, and the command goes on.

    Args:
        workdir: the folder.

    Raises:
        UserError: another command holds it; the message says which.
        OSError: the folder cannot be written to.
    """
    if not hosts.is_first():
        yield
        return
    made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    path = workdir / files.LOCK
    try:
        while (file := _take(path)) is None:
            pass  # who held it has just removed it
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # as long as it is ours
            os.close(file)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()


def _take(path: Path) -> int | None:
    """Returns the file, open, locked and with this process's name in it.

    None, if who held it has removed the file or its folder since it was opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
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
    except (OSError, ValueError, KeyError):  # it is just beginning, or ending
        return "another process"
