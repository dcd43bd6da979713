"""Memory that is freed stays."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, threading
from ulsad_jax.runtime import host_memory

{call}
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = []
for _ in range(2):  # each in a thread of its own, as XLA's executions are
    thread = threading.Thread(target=lambda: found.append(faults()))
    thread.start()
    thread.join()
print(*found)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_keeps_freed_pages(kept):
    """A block as large as one before it takes no new pages from the system."""
    call = "host_memory.keep_freed()" if kept else ""
    first, second = map(
        int,
        subprocess.run(
            [sys.executable, "-c", PROGRAM.format(call=call)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(),
    )
    assert (second < first / 10) == kept
