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

import importlib.util
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.turns import Side, clock, compare, format_row

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
    fewer = min(_FEWER.value or _CHOSEN.value, _CHOSEN.value)
    sides = (
        Side(
            Ours, patches=_PATCHES.value, channels=_CHANNELS.value, chosen=_CHOSEN.value
        ),
        Side(Theirs, patches=_PATCHES.value, channels=_CHANNELS.value, chosen=fewer),
    )
    print("| what | ours | anomalib | ratio | turns |")
    print("|---|---|---|---|---|")
    for job in ("same points", "own projection"):
        (_, rows), (_, others) = (side.ask("select", job) for side in sides)  # compiles
        times = [
            [side.ask("select", job)[0] for side in sides] for _ in range(_ROUNDS.value)
        ]
        a, b = zip(*times, strict=True)
        b = [seconds * _CHOSEN.value / fewer for seconds in b]
        name = f"{job}, {_CHOSEN.value} of {_PATCHES.value}"
        if job == "same points":
            equal = sum(x == y for x, y in zip(rows[:fewer], others, strict=True))
            name += f", {equal} of {fewer} choices equal"
        print(format_row(compare(name, a, b)), flush=True)


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


class Coreset:
    """A side: its `jobs` return rows by name."""

    jobs: dict[str, Callable[[], Iterable[int]]]

    def select(self, job: str) -> tuple[float, list[int]]:
        """Returns seconds and the rows that were chosen."""
        seconds, rows = clock(self.jobs[job])
        return seconds, [int(row) for row in rows]


class Ours(Coreset):
    """This package's coreset."""

    def __init__(self, patches: int, channels: int, chosen: int):
        """Draws the patches."""
        from ulsad_jax.runtime import host_memory

        host_memory.keep_freed()  # as train.py does
        import jax

        from ulsad_jax.methods import patchcore

        x, points = map(jax.device_put, draw(patches, channels))
        key = jax.random.key(0)
        self.jobs = {
            "same points": lambda: np.asarray(
                patchcore.select_coreset(points, 0, chosen)
            ),
            "own projection": lambda: np.asarray(
                patchcore.choose(key, x, count=chosen, dimensions=128)
            ),
        }


class Theirs(Coreset):
    """anomalib's coreset."""

    def __init__(self, patches: int, channels: int, chosen: int):
        """Draws the patches."""
        import torch
        from anomalib.models.components import KCenterGreedy

        torch.set_grad_enabled(False)
        x, points = map(torch.tensor, draw(patches, channels))

        def select(x, own_projection):
            sampler = KCenterGreedy(x, (chosen + 0.5) / len(x))
            if own_projection:
                return sampler.select_coreset_idxs()
            sampler.model.fit, sampler.model.transform = lambda _: None, lambda x: x
            with mock.patch("torch.randint", return_value=torch.tensor([0])):
                return sampler.select_coreset_idxs()

        self.jobs = {
            "same points": lambda: select(points, own_projection=False),
            "own projection": lambda: select(x, own_projection=True),
        }


if __name__ == "__main__":
    app.run(main)
