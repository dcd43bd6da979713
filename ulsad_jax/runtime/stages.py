"""Time and memory of the stages of a run, in stages.json of a category's folder."""

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

STAGES = "stages.json"


@contextlib.contextmanager
def measure(folder: Path, stage: str) -> Iterator[None]:
    """Records what the block took, in place of what the stage took before.

    Memory is the most that the process, and its device, have had until the stage's
    end: neither can be asked for a single stage. Where the backend does not count,
    as on CPUs, the device's is None.

    Args:
        folder: of the category.
        stage: its name.
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
    path = folder / STAGES
    others = json.loads(path.read_text()) if path.exists() else {}
    others.pop(stage, None)  # in the order in which they ran
    files.replace(path, json.dumps(others | {stage: record}, indent=2) + "\n")


def peak_bytes() -> int:
    """The most memory that the process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB on Linux
