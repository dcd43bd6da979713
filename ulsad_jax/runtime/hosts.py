"""Coordinates many hosts, with one process each, that run the same program.

Every process reads its share of the images, computes on its own devices, and has
all results. Only the first one reports and writes files; checkpoints are written by
all. With one process nothing here has an effect.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ulsad_jax.runtime.errors import UserError, is_out_of_memory, sentence

SHUTDOWN_SECONDS = 10  # time a failing process gives the others to end


def is_first() -> bool:
    """Returns whether this process is the one that reports and writes."""
    return jax.process_index() == 0


@contextmanager
def joined(
    *,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_seconds: int,
) -> Iterator[None]:
    """Joins the other processes, and leaves when all are done.

    JAX finds out the arguments that are None: from SLURM, Kubernetes, Open MPI or a TPU
    pod.

    Args:
        coordinator: "host:port" of process 0.
        num_processes: number of processes.
        process_id: number of this process, from 0.
        heartbeat_seconds: time after which a silent process is taken for dead, and the
            others end.

    Raises:
        UserError: the other processes cannot be found. If one is lost later, this
            process ends at once, with a message and status 1.
    """
    # JAX's preemption service would take SIGTERM away from the trainer.
    jax.config.update("jax_enable_preemption_service", False)
    print("Waiting for the other processes, up to five minutes.", flush=True)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            "Expected to find and join the other processes of this run, found: "
            f"{sentence(str(error)[:300])} Start it with srun, in Kubernetes or on a "
            "TPU pod, or give every process --coordinator=host:port, --num_processes= "
            "and --process_id=."
        ) from error
    try:
        # At once: on CPUs the first collective connects the processes, and fails
        # after 30 seconds.
        multihost_utils.sync_global_devices("joined")
        yield
        multihost_utils.sync_global_devices("done")
    except (RuntimeError, TimeoutError, ValueError) as error:
        if not tells_a_loss(error):
            raise
        print(
            f"error: Expected {jax.process_count()} processes until the end, lost one: "
            f"{error!s:.300}. Look for the reason in its output. Start all of them "
            "again to go on from the last checkpoint.",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # an orderly exit would wait for the lost process


def gather(tree: Any) -> Any:
    """Returns a tree of whole NumPy arrays, in every process.

    Args:
        tree: tree of arrays on the devices of all processes, or of NumPy arrays
            [b, ...] with this process's share of the rows.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def check_same(text: str, what: str) -> None:
    """Checks that all processes have the same text.

    Args:
        text: text of this process.
        what: name of the text, for the message.

    Raises:
        UserError: texts differ. Every process raises it, and the message lists the
            processes that differ from process 0.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = gather(digest[None])
    others = np.flatnonzero((digests != digests[0]).any(1))
    if others.size:
        raise UserError(
            f"Expected all processes to have the same {what}, found another one than "
            f"process 0's in process {', '.join(map(str, others))}. Give every process "
            "the same command but for --process_id."
        )


@contextmanager
def first_alone(what: str) -> Iterator[None]:
    """Runs the block in the first process, and then in the others.

    Args:
        what: name of the block, the same in all processes.
    """
    if not is_first():
        multihost_utils.sync_global_devices(what)
    yield
    if is_first() and jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def tells_a_loss(error: BaseException | None) -> bool:
    """Returns whether an exception means that another process was lost."""
    if error is None or jax.process_count() == 1 or is_out_of_memory(error):
        return False
    kinds = jax.errors.JaxRuntimeError, TimeoutError
    return isinstance(error, kinds) or "Gloo" in str(error)
