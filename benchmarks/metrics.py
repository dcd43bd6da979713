"""Time of the pixel metrics over a category's maps, as JSON.

    python benchmarks/metrics.py

By default 83 drawn maps of 256 x 256 pixels, the test set of MVTec AD's bottles, with
defects on three of four. Everything is measured `--repeats` times after a first call;
the median and the extremes are printed, in seconds.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_IMAGES = flags.DEFINE_integer("images", 83, "Images.", lower_bound=2)
_SIZE = flags.DEFINE_integer("size", 256, "Pixels a side.", lower_bound=64)
_REPEATS = flags.DEFINE_integer("repeats", 9, "Timed calls.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    from ulsad_jax.metrics import pixel
    from ulsad_jax.runs import evaluation

    masks, maps = draw(_IMAGES.value, _SIZE.value)
    known = np.ones(len(maps), bool)

    def draw_curves():
        stream = evaluation.stream_pixels(masks, known, maps)
        return evaluation.pixel_curves(stream, loco=False)

    report = {
        "images": len(maps),
        "size": _SIZE.value,
        "defective_share": float(masks.mean()),
        "cores": os.cpu_count(),
        "numpy": np.__version__,
        "aupro": pixel.aupro(masks, maps),
        "seconds": {
            "aupro": measure(lambda: pixel.aupro(masks, maps)),
            "all pixel metrics": measure(lambda: pixel.pixel_metrics(masks, maps)),
            "curves": measure(draw_curves),
        },
    }
    print(json.dumps(report, indent=2))


def measure(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call: the median, least and most."""
    call()
    seconds = []
    for _ in range(_REPEATS.value):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    found = {"median": statistics.median(seconds)}
    found |= {"min": min(seconds), "max": max(seconds)}
    return {name: round(value, 4) for name, value in found.items()}


def draw(n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks and maps [n, size, size]: smooth noise, higher on up to three boxes."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(n, size, size))
    maps = ndimage.gaussian_filter(noise, (0, 4, 4)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    for i, mask in enumerate(masks):
        for _ in range(i % 4):
            (y, x), (height, width) = (
                rng.integers(0, size - 32, 2),
                rng.integers(4, 32, 2),
            )
            mask[y : y + height, x : x + width] = True
    return masks, maps + np.float32(0.05) * masks


if __name__ == "__main__":
    app.run(main)
