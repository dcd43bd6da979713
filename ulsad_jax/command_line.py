"""Defines flags and start-up code that the command-line programs share."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import traceback
from collections.abc import Callable
from operator import getitem
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from ulsad_jax.runtime import errors, host_memory

SELECTIONS = ("last", "best_validation_loss", "best_test_auroc")


def begin(argv: list[str]) -> None:
    """Rejects positional arguments, silences libraries and keeps freed memory.

    Call it before anything else: see `host_memory.keep_freed`.

    Raises:
        app.UsageError: there are positional arguments.
    """
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags alone, found {' '.join(argv[1:])!r}.")
    logging.set_verbosity(logging.WARNING)
    host_memory.keep_freed()


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments for a trained category, its checkpoint and thresholds."""
    add = parser.add_argument
    add("--workdir", required=True, type=as_path, help="Folder that train.py wrote.")
    add("--category", default="", help="Where the run has several.")
    add(
        "--selection",
        default="",
        choices=SELECTIONS,
        help="Another checkpoint than the config's.",
    )
    add("--image_threshold", type=float, help="Instead of the run's.")
    add("--pixel_threshold", type=float, help="Instead of the run's.")


def as_path(text: str) -> Path:
    """Returns the path that `text` names, with a leading ~ expanded."""
    return Path(text).expanduser()


def define_processes() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Defines the flags of a program that can run as several processes.

    Returns:
        A function that returns a context manager. In that context this process has
        joined the other processes, if the flags ask for it.
    """
    distributed = flags.DEFINE_boolean(
        "distributed",
        False,
        "Joins the processes that SLURM, Kubernetes, Open MPI or a TPU pod started.",
    )
    coordinator = flags.DEFINE_string(
        "coordinator", None, "host:port of process 0, where nothing else tells it."
    )
    num_processes = flags.DEFINE_integer(
        "num_processes", None, "With --coordinator: how many processes there are."
    )
    process_id = flags.DEFINE_integer(
        "process_id", None, "With --coordinator: which one this is, from 0."
    )
    heartbeat = flags.DEFINE_integer(
        "heartbeat_seconds",
        100,
        "Silence after which a process is taken for dead, and the others end.",
        lower_bound=1,
    )

    def join() -> contextlib.AbstractContextManager[None]:
        by_hand = coordinator.value, num_processes.value, process_id.value
        if None in by_hand and any(value is not None for value in by_hand):
            raise app.UsageError(
                "Expected --coordinator, --num_processes and --process_id together."
            )
        if not distributed.value and None in by_hand:
            return contextlib.nullcontext()
        from ulsad_jax.runtime import hosts

        return hosts.joined(
            coordinator=by_hand[0],
            num_processes=by_hand[1],
            process_id=by_hand[2],
            heartbeat_seconds=heartbeat.value,
        )

    return join


def parse(argv: list[str], config: flags.FlagHolder) -> list[str]:
    """Parses the flags; exits with a message for a wrong config file or field."""
    try:
        arguments = app.parse_flags_with_usage(argv)
        _ = config.value.seed  # fails here if the file could not be read
        _check_once(argv, config.value)
        return arguments
    except (AttributeError, LookupError, OSError, SyntaxError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name == "get_config" for frame in frames):
            raise  # an error inside the config file
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        found = error.args[0] if isinstance(error, KeyError) else error
        sys.exit(
            "error: Expected a config file, --config=<file>.py[:<category>], and "
            f"fields of it, --config.<field>=<value>, found: {errors.sentence(found)} "
            "See docs/runs.md; configs/default.py has every field. A "
            "number of a loss term has to be in the term's entry of the config file "
            "before a flag can change it."
        )


def _check_once(argv: list[str], config: Any) -> None:
    """Rejects a tuple flag given twice, because ml_collections would join both."""
    names = [word.partition("=")[0].lstrip("-") for word in argv if word[:1] == "-"]
    for name in dict.fromkeys(n for n in names if names.count(n) > 1):
        first, *fields = name.split(".")
        value = functools.reduce(getitem, fields, config) if first == "config" else None
        if isinstance(value, tuple):
            sys.exit(
                f"error: Expected --{name} once, found it {names.count(name)} times, "
                f"which together make {value}. Give it once."
            )
