"""Runs one measurement of a program in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any


def run_cell(
    command: Sequence[str], environment: Mapping[str, str], limit: float
) -> dict[str, Any]:
    """Runs a command, and returns the JSON that it prints in its last line.

    Args:
        command: program and arguments.
        environment: variables in addition to those of this process.
        limit: seconds that it may take.

    Returns:
        What it printed; {"error": why} if it failed, its last words, or took too long.
    """
    try:
        ran = subprocess.run(
            command,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {limit} s"}
    if ran.returncode:
        return {"error": (ran.stderr.strip().splitlines() or ["killed"])[-1][:300]}
    return json.loads(ran.stdout.splitlines()[-1])
