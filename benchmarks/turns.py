"""Runs the sides of a comparison in turns, each in a process of its own.

A side sleeps until it is asked, so that the other one has the machine to itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any


class Side:
    """A process in which an object's methods are called."""

    def __init__(self, make: Callable[..., Any], **options: Any):
        """Makes the object there, `make(**options)`, and waits until that is done.

        Args:
            make: function or class of a module, called in the process.
            options: its arguments.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make, options), daemon=True
        )
        self._process.start()
        theirs.close()
        self._connection.recv()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the object and waits for its result."""
        self._connection.send((method, arguments))
        return self._connection.recv()

    def end(self) -> None:
        """Ends the process, and with it its memory."""
        self._connection.close()
        self._process.join()


def _serve(
    connection: Connection, make: Callable[..., Any], options: dict[str, Any]
) -> None:
    """Answers (method, arguments) until the parent is gone."""
    worker = make(**options)
    connection.send(None)  # it is made
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(worker, method)(*arguments))


def clock(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds and the result of one call."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def compare(name: str, ours: Sequence[float], theirs: Sequence[float]) -> dict:
    """Returns medians, their ratio, and the extremes of the ratio among the turns."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    a, b = statistics.median(ours), statistics.median(theirs)
    return {
        "name": name,
        "ours": a,
        "theirs": b,
        "ratio": a / b,
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def format_row(row: dict, unit: str = "s") -> str:
    """Returns a row of `compare` as a line of a Markdown table."""
    return (
        f"| {row['name']} | {row['ours']:.3g} {unit} | {row['theirs']:.3g} {unit} | "
        f"{row['ratio']:.3g} | {row['lowest']:.3g} to {row['highest']:.3g} |"
    )
