"""Time of PatchCore's coreset over that of anomalib's, in turns, as a table.

    pip install anomalib==2.7.0 torch
    python benchmarks/coreset.py --patches=20000 --chosen=1000

Each library has a process of its own and sleeps while the other works; rounds go A B
A B ... A ratio below 1 means that this package is faster. "Same points": both choose
among the same points, from the same first one, and the table says how many choices are
equal. "Own projection": each projects the patches first, as it does by default, to 128
dimensions here, and to a number that grows with that of the patches there. Patches are
noise whose variance falls from channel to channel.
"""

import contextlib
import importlib.util
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_PATCHES = flags.DEFINE_integer("patches", 20_000, "Patches to choose among.")
_CHOSEN = flags.DEFINE_integer("chosen", 1000, "Patches to choose.", lower_bound=1)
_CHANNELS = flags.DEFINE_integer("channels", 384, "Channels of a patch.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
_FEWER = flags.DEFINE_integer(
    "fewer",
    0,
    "Choices to time anomalib's with, whose time is multiplied by chosen / fewer: each "
    "of them passes over all patches. 0 for all.",
)

EPSILON = 0.9  # of anomalib's projection


def main(argv: list[str]) -> None:
    """Compares, measures and prints."""
    del argv
    if importlib.util.find_spec("anomalib") is None:
        sys.exit("Expected anomalib 2.7.0 and torch, found no anomalib. Install them.")
    options = _PATCHES.value, _CHANNELS.value, _CHOSEN.value
    fewer = min(_FEWER.value or _CHOSEN.value, _CHOSEN.value)
    ours = start(serve_ours, options)
    theirs = start(serve_theirs, (*options[:2], fewer))
    print("| what | ours, s | anomalib, s | ratio | lowest and highest of turns |")
    print("|---|---|---|---|---|")
    for job in ("same points", "own projection"):
        (_, rows), (_, others) = (ask(side, job) for side in (ours, theirs))  # compiles
        times = [
            [ask(side, job)[0] for side in (ours, theirs)] for _ in range(_ROUNDS.value)
        ]
        a, b = zip(*times, strict=True)
        b = [seconds * _CHOSEN.value / fewer for seconds in b]
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        a, b = statistics.median(a), statistics.median(b)
        note = ""
        if job == "same points":
            equal = sum(x == y for x, y in zip(rows[:fewer], others, strict=True))
            note = f", {equal} of {fewer} choices equal"
        print(
            f"| {job}, {_CHOSEN.value} of {_PATCHES.value}{note} | {a:.3g} | {b:.3g} "
            f"| {a / b:.3f} | {min(ratios):.3f}, {max(ratios):.3f} |",
            flush=True,
        )


def start(serve, options):
    """Starts a process; returns the connection to it."""
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, *options), daemon=True).start()
    theirs.close()
    return connection


def ask(connection, job: str) -> tuple[float, list[int]]:
    """Returns seconds and the rows that were chosen."""
    connection.send(job)
    return connection.recv()


def answer(connection, jobs) -> None:
    """Runs jobs and measures them until the other process ends."""
    with contextlib.suppress(EOFError):
        while True:
            job = jobs[connection.recv()]
            started = time.perf_counter()
            rows = job()
            seconds = time.perf_counter() - started
            connection.send((seconds, [int(row) for row in rows]))


def draw(patches: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns patches and points, float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((patches, channels), np.float32)
    x *= 3 / np.sqrt(np.arange(1, channels + 1, dtype=np.float32))
    # The number of dimensions of Johnson and Lindenstrauss' lemma.
    bound = EPSILON**2 / 2 - EPSILON**3 / 3
    dimensions = int(4 * math.log(patches) / bound)
    matrix = rng.standard_normal((channels, dimensions), np.float32)
    return x, x @ (matrix / np.sqrt(np.float32(dimensions)))


def serve_ours(connection, patches: int, channels: int, chosen: int) -> None:
    """Answers with this package's coreset."""
    from ulsad_jax.runtime import host_memory

    host_memory.keep_freed()  # as train.py does
    import jax

    from ulsad_jax.methods import patchcore

    x, points = map(jax.device_put, draw(patches, channels))
    key = jax.random.key(0)
    jobs = {
        "same points": lambda: np.asarray(patchcore.select_coreset(points, 0, chosen)),
        "own projection": lambda: np.asarray(
            patchcore.choose(key, x, count=chosen, dimensions=128)
        ),
    }
    answer(connection, jobs)


def serve_theirs(connection, patches: int, channels: int, chosen: int) -> None:
    """Answers with anomalib's coreset."""
    from unittest import mock

    import torch
    from anomalib.models.components import KCenterGreedy

    x, points = map(torch.tensor, draw(patches, channels))

    def select(x, own_projection):
        sampler = KCenterGreedy(x, (chosen + 0.5) / len(x))
        if own_projection:
            return sampler.select_coreset_idxs()
        sampler.model.fit, sampler.model.transform = lambda _: None, lambda x: x
        with mock.patch("torch.randint", return_value=torch.tensor([0])):
            return sampler.select_coreset_idxs()

    jobs = {
        "same points": lambda: select(points, own_projection=False),
        "own projection": lambda: select(x, own_projection=True),
    }
    with torch.no_grad():
        answer(connection, jobs)


if __name__ == "__main__":
    app.run(main)
