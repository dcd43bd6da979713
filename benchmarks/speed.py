"""Speed of this package over plain PyTorch's, measured in turns, as a table and JSON.

    pip install torch
    python benchmarks/speed.py --output=speed.json

Each library has a process of its own and sleeps while the other works; rounds go
A B C A B C ... A ratio below 1 means that this package is faster. Both compute on the
same weights and images; a difference in features, maps, losses or an update ends the
run before anything is timed. On a GPU that both find, the same commands measure there.
"""

import json
import math
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.turns import Side, compare, format_row

_ONLY = flags.DEFINE_list("only", ["step", "predict", "fit"], "Which rows to measure.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 8, "Images of a training step and of inference.")
_SIZE = flags.DEFINE_integer("size", 256, "Pixels a side.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "tfloat32", "bfloat16"],
    "Computation type. tfloat32 is float32 with a GPU's products in TF32, as train.py "
    "has it there; bfloat16 is PyTorch's autocast.",
)
_LAYOUT = flags.DEFINE_enum(
    "torch_training_layout",
    "contiguous_format",
    ["contiguous_format", "channels_last"],
    "Of the trained networks in PyTorch; the rest is channels_last.",
)
_COMPILED = flags.DEFINE_bool("torch_compile", False, "Whether PyTorch compiles, too.")
_MEMORY_KEPT = flags.DEFINE_bool(
    "torch_memory_kept",
    False,
    "Whether PyTorch's process keeps freed memory, too, as train.py does.",
)
_IMAGES = flags.DEFINE_integer("images", 209, "Training images of the fit.")
_EPOCHS = flags.DEFINE_integer("epochs", 20, "Epochs of the fit.")
_OUTPUT = flags.DEFINE_string("output", "", "A JSON file to write.")

OPERATIONS = 50.8e9  # of one image of 256 x 256 through all networks, forward
# ||ours - PyTorch's|| / ||PyTorch's|| that rounding explains. After an update it is
# more: Adam's first moves a weight by its gradient's sign, rounding error or not.
TOLERANCES = {
    "float32": {
        "features": 1e-4,
        "map": 1e-3,
        "first losses": 1e-4,
        "second losses": 1e-3,
    },
    "tfloat32": {
        "features": 1e-2,
        "map": 2e-2,
        "first losses": 5e-3,
        "second losses": 2e-2,
    },
    "bfloat16": {
        "features": 5e-2,
        "map": 1e-1,
        "first losses": 2e-2,
        "second losses": 5e-2,
    },
}


def main(argv: list[str]) -> None:
    """Compares, measures and prints."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = sides = start_sides(str(Path(folder) / "weights.npz"))
    check_equal(ours, theirs)
    times = measure(ours, theirs)
    first = ours.ask("first_calls")
    report = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": ours.ask("read_versions") | theirs.ask("read_versions"),
        "dtype": _DTYPE.value,
        "batch": _BATCH.value,
        "image_size": _SIZE.value,
        "torch_compile": _COMPILED.value,
        "torch_memory_kept": _MEMORY_KEPT.value,
        "seconds": times,
        "first_call_seconds": first,
        "peak_device_bytes": [side.ask("peak_memory") for side in sides],
        "rows": make_rows(times, first),
    }
    print_table(report)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(report, indent=2) + "\n")


def start_sides(weights: str) -> tuple[Side, Side]:
    """Ours first: it writes the weights that PyTorch's reads."""
    from benchmarks import speed_sides

    options = {
        "size": _SIZE.value,
        "batch": _BATCH.value,
        "dtype": _DTYPE.value,
        "weights": weights,
        "training_layout": _LAYOUT.value,
        "compiled": _COMPILED.value,
    }
    # Ours keeps freed memory, as train.py does.
    ours = Side(speed_sides.make, side="jax", memory_kept=True, **options)
    theirs = Side(
        speed_sides.make, side="torch", memory_kept=_MEMORY_KEPT.value, **options
    )
    return ours, theirs


def check_equal(ours: Side, theirs: Side) -> None:
    """Ends the run if the two compute different things."""
    wanted = set(_ONLY.value)
    parts = bool(wanted & {"step", "fit"}), "predict" in wanted
    a, b = (side.ask("results", *parts) for side in (ours, theirs))
    for name in a:
        limit = TOLERANCES[_DTYPE.value][name]
        error = np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name])
        print(f"{name}: relative difference {error:.1e}", file=sys.stderr)
        if not error < limit:
            sys.exit(f"Expected the same {name} within {limit}, found {error:.1e}.")


def measure(ours: Side, theirs: Side) -> dict[str, list[float]]:
    """Seconds of every turn, by side and job."""
    groups = []
    if {"step", "fit"} & set(_ONLY.value):
        groups.append(
            {
                "ours step": (ours, "step"),
                "theirs step": (theirs, "step"),
                "theirs step with trunk": (theirs, "step_with_trunk"),
            }
        )
    if "fit" in _ONLY.value:
        groups.append(
            {"ours extract": (ours, "extract"), "theirs extract": (theirs, "extract")}
        )
    if "predict" in _ONLY.value:
        for batch in (_BATCH.value, 1):
            groups.append(
                {
                    f"ours predict {batch}": (ours, "predict", batch),
                    f"theirs predict {batch}": (theirs, "predict", batch),
                }
            )
    times: dict[str, list[float]] = {}
    for group in groups:
        warm = "ours step" in group  # by the steps of `check_equal`
        for turn in range(_ROUNDS.value + (not warm)):
            for label, (side, *request) in group.items():
                seconds = side.ask(*request)
                if warm or turn:
                    times.setdefault(label, []).append(seconds)
    return times


def make_rows(times: dict[str, list[float]], first: dict[str, float]) -> list[dict]:
    """What is compared: seconds of both and their ratios."""
    pairs = {}
    if "step" in _ONLY.value:
        name = f"training step, batch {_BATCH.value}, "
        pairs[name + "PyTorch runs the trunk"] = ("step", "step with trunk")
        pairs[name + "both from kept features"] = ("step", "step")
    if "predict" in _ONLY.value:
        for batch in (_BATCH.value, 1):
            job = f"predict {batch}"
            pairs[f"uint8 images to maps, batch {batch}"] = (job, job)
    rows = [
        compare(name, times[f"ours {ours}"], times[f"theirs {theirs}"])
        for name, (ours, theirs) in pairs.items()
    ]
    if "fit" in _ONLY.value:
        rows.append(compare_fit(times, first))
    return rows


def compare_fit(times: dict[str, list[float]], first: dict[str, float]) -> dict:
    """A whole fit, put together from measured parts.

    Ours: the first calls, which compile, then one extraction of the images and the
    steps from kept features. PyTorch's, as the reference does it: one pass of the trunk
    for the channel statistics, and the steps that run it again. Decoding, validation
    and saving are left out on both sides.
    """
    batches = math.ceil(_IMAGES.value / _BATCH.value)
    steps = _IMAGES.value // _BATCH.value * _EPOCHS.value
    started = sum(first.values())
    ours = [
        started + batches * extract + steps * step
        for extract, step in zip(times["ours extract"], times["ours step"], strict=True)
    ]
    theirs = [
        batches * extract + steps * step
        for extract, step in zip(
            times["theirs extract"], times["theirs step with trunk"], strict=True
        )
    ]
    name = f"fit, {_IMAGES.value} images, {_EPOCHS.value} epochs (put together)"
    return compare(name, ours, theirs)


def print_table(report: dict) -> None:
    """Prints the rows as Markdown, and images/s and TFLOP/s of inference."""
    print("| what | ours | PyTorch | ratio | turns |")
    print("|---|---|---|---|---|")
    for row in report["rows"]:
        print(format_row(row))
    for batch in (_BATCH.value, 1):
        if seconds := report["seconds"].get(f"ours predict {batch}"):
            images = batch / statistics.median(seconds)
            scale = OPERATIONS * (_SIZE.value / 256) ** 2 / 1e12
            print(
                f"ours, batch {batch}: {images:.4g} images/s, "
                f"{images * scale:.3g} TFLOP/s"
            )


if __name__ == "__main__":
    app.run(main)
