"""Time and memory of methods over those of anomalib's, in turns, as a table.

    pip install anomalib==2.7.0 torch
    python benchmarks/peers.py

Each library has a process of its own and sleeps while the other works; rounds go A B
A B ... A ratio below 1 means that this package is faster, or takes less memory. The
first fit is a stranger's first: it has our compilation in it.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.turns import Side, compare, format_row

_METHODS = flags.DEFINE_list(
    "methods", ["patchcore", "padim", "efficientad"], "What to compare."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("images", 40, "Training images.", lower_bound=8)
_SIZE = flags.DEFINE_integer("size", 256, "Pixels a side.")
_BATCH = flags.DEFINE_integer(
    "batch", 8, "Images of a batch in the fit; EfficientAD's have 1."
)

GIB = 2.0**30


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    if importlib.util.find_spec("anomalib") is None:
        sys.exit("Expected anomalib 2.7.0 and torch, found no anomalib. Install them.")
    print("| what | ours | anomalib | ratio | turns |")
    print("|---|---|---|---|---|")
    for method in _METHODS.value:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(method, str(Path(folder) / "trunk.npz")):
                print(row, flush=True)


def measure(method: str, path: str) -> list[str]:
    """Returns the lines of a method."""
    from benchmarks import peers_sides

    options = {
        "method": method,
        "images": _IMAGES.value,
        "size": _SIZE.value,
        "batch": 1 if method == "efficientad" else _BATCH.value,
        "path": path,
    }
    # Ours first: it writes the weights that anomalib's reads.
    sides = [Side(side, **options) for side in (peers_sides.Ours, peers_sides.Theirs)]
    rows = [compare(f"{method}, first fit", *take_turns(sides, 1, "fit"))]
    peaks = [[side.ask("read_peak") / GIB] for side in sides]
    if _ROUNDS.value > 1:
        turns = take_turns(sides, _ROUNDS.value - 1, "fit")
        rows.append(compare(f"{method}, fit", *turns))
    for count in (1, 8):
        take_turns(sides, 2, "predict", count)  # compiles, and chooses algorithms
        turns = take_turns(sides, 5 * _ROUNDS.value, "predict", count)
        rows.append(compare(f"{method}, predict, batch {count}", *turns))
    lines = [format_row(row) for row in rows]
    memory = compare(f"{method}, most memory of the process, first fit", *peaks)
    for side in sides:
        side.end()
    return [*lines, format_row(memory, "GiB")]


def take_turns(
    sides: list[Side], rounds: int, job: str, *arguments: int
) -> list[list[float]]:
    """Returns the seconds of every turn, by side."""
    turns = [[side.ask(job, *arguments) for side in sides] for _ in range(rounds)]
    return [list(column) for column in zip(*turns, strict=True)]


if __name__ == "__main__":
    app.run(main)
