from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Eight devices, and programs that are compiled quickly.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
)


def test_many_devices():
    """How many devices there are is settled when JAX starts: a process of its own."""
    flags = " ".join([os.environ["XLA_FLAGS"], *FLAGS])
    program = Path(__file__).with_name("eight_devices.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n0",
            "-p",
            "no:cacheprovider",
            program,
        ],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
