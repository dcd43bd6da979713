"""Records the time and memory of the stages of a run."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from ulsad_jax.runtime import files, hosts


@contextlib.contextmanager
def measure(path: Path, stage: str) -> Iterator[None]:
    """Records the time and memory of a block, and replaces the stage's earlier record.

    Memory is the peak of the process, and of its device, from the start of the process
    to the end of the stage, because neither has a peak per stage. The device's peak is
    None if the backend does not measure it, as on CPUs.

    Args:
        path: JSON file of all stages.
        stage: name of the stage.
    """
    started = time.perf_counter()
    yield
    if not hosts.is_first():
        return
    seconds = time.perf_counter() - started
    device = jax.devices()[0]
    record = {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "device": device.device_kind,
        "device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }
    others = json.loads(path.read_text()) if path.exists() else {}
    others.pop(stage, None)  # keeps the stages in the order of their runs
    files.replace(path, json.dumps(others | {stage: record}, indent=2) + "\n")


def peak_bytes() -> int:
    """Returns the peak memory of the process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB on Linux
