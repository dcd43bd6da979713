"""Error and memory of the streamed metrics at original resolution, as JSON.

    python benchmarks/spro.py

`category`: a category of MVTec LOCO AD's size is generated and measured, one image at a
time: peak memory, time, and the most by which binning can have changed the results.
`errors`: on data that fits in memory, the streamed results against the exact ones.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from absl import app, flags
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_IMAGES = flags.DEFINE_integer("images", 337, "Images of the category.", lower_bound=3)
_HEIGHT = flags.DEFINE_integer("height", 1280, "Of the images in pixels.")
_WIDTH = flags.DEFINE_integer("width", 1600, "Of the images in pixels.")

MODEL = (256, 256)  # resolution of the maps before they are enlarged
GROUPS = ("good", "logical_anomalies", "structural_anomalies")
# Maps from standard normal noise.
KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "around 0": lambda x: 0.1 * x,
    "positive": np.exp,
    "far from 0": lambda x: 1000 + 0.01 * x,
    "half of them 0": lambda x: np.maximum(x, 0),
    "256 levels": lambda x: np.round(32 * x) / 32,
    "overconfident": lambda x: 1 / (1 + np.exp(-5 * x)),
    "two ranges": lambda x: np.where(x > 1, 1000 + 0.01 * x, 0.1 * x),
    "few large": lambda x: np.where(x > 4, 1e6 * x, x),
    "constant": np.zeros_like,
}


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    size = (_HEIGHT.value, _WIDTH.value)
    # Memory first: its peak is the whole process's.
    report = {"category": measure_category(_IMAGES.value, size)}
    report["errors"] = {kind: measure_errors(KINDS[kind]) for kind in KINDS}
    print(json.dumps(report, indent=2))


def measure_category(n: int, size: tuple[int, int]) -> dict[str, float]:
    """Streams `n` images of maps around 0."""
    from ulsad_jax.metrics import spro, stream

    before, start = read_peak(), time.perf_counter()
    result = stream.PixelStream()
    adding = 0.0
    for image in generate(n, size, KINDS["around 0"]):
        began = time.perf_counter()
        result.add(*image[:3], group=image[3])
        adding += time.perf_counter() - began
    areas, bounds = {}, {}
    for group in GROUPS[1:]:
        groups = ("good", group)
        areas[group] = result.au_spro(groups)
        bounds[group] = {
            limit: result.error_bound(stream.CHANNELS, groups, fpr_limit=limit)
            for limit in spro.LIMITS
        }
    return {
        "images": n,
        "pixels": n * size[0] * size[1],
        "peak_mib_on_top": round(read_peak() - before),
        "seconds_an_image": round(adding / n, 3),
        "seconds_with_generation": round(time.perf_counter() - start, 1),
        "au_spro": areas,
        "error_at_most": bounds,
        "pixel_auroc": result.auroc(),
        "aupro": result.aupro(),
    }


def measure_errors(transform: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """The largest error over the limits, and of AUPRO and AUROC."""
    from sklearn import metrics as sklearn_metrics

    from ulsad_jax.metrics import pixel, spro, stream

    images = list(generate(12, (720, 960), transform))
    result = stream.PixelStream()
    for image in images:
        result.add(*image[:3])
    maps, channels, areas, _ = zip(*images, strict=True)
    exact, streamed = spro.au_spro(maps, channels, areas), result.au_spro()
    bounds = [result.error_bound(stream.CHANNELS, fpr_limit=k) for k in exact]
    masks, maps = np.stack([c.any(0) for c in channels]), np.stack(maps)
    auroc = sklearn_metrics.roc_auc_score(masks.ravel(), maps.ravel())
    return {
        "au_spro": max(abs(streamed[k] - exact[k]) for k in exact),
        "au_spro_bound": max(bounds),
        "aupro": abs(result.aupro() - pixel.aupro(masks, maps)),
        "auroc": abs(result.auroc() - auroc),
    }


def generate(
    n: int, size: tuple[int, int], transform: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray, list[int], str]]:
    """Images one at a time: map, channels, saturation areas, group."""
    from ulsad_jax.data.resize import resize_map, resize_nearest

    rng = np.random.default_rng(0)
    for i in range(n):
        noise = ndimage.gaussian_filter(rng.normal(size=MODEL), 4)
        masks = np.zeros((i % 3, *MODEL), bool)  # none, one or two that may overlap
        for mask in masks:
            y, x = rng.integers(0, 200, 2)
            mask[y : y + rng.integers(8, 50), x : x + rng.integers(8, 50)] = True
        scores = noise / noise.std() + 2 * masks.any(0)
        channels = np.zeros((len(masks), *size), bool)
        for mask, channel in zip(masks, channels, strict=True):
            channel[:] = resize_nearest(mask, size)
        areas = [max(1, int(0.5 * channel.sum())) for channel in channels]
        anomaly_map = resize_map(transform(scores).astype(np.float32), size)
        yield anomaly_map, channels, areas, GROUPS[i % 3]


def read_peak() -> float:
    """Peak resident memory of this process in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    app.run(main)
