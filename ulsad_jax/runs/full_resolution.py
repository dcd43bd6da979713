"""Metrics at the images' own resolution, and maps on disk for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ulsad_jax.data.batches import Examples
from ulsad_jax.data.records import GOOD
from ulsad_jax.data.resize import resize_map
from ulsad_jax.metrics import spro
from ulsad_jax.metrics.image import LOGICAL, STRUCTURAL
from ulsad_jax.metrics.regions import saturation_area
from ulsad_jax.metrics.stream import PixelStream
from ulsad_jax.runs import results
from ulsad_jax.runtime.progress import progress

if TYPE_CHECKING:
    from jaxtyping import Float32


def stream_pixels(
    examples: Examples,
    maps: Float32[np.ndarray, "n h w"],
    *,
    loco: bool,
    title: str,
) -> PixelStream:
    """Reads the pixels of the images whose mask is known, each at its own resolution.

    Maps are enlarged bilinearly, one at a time; masks stay as they are.

    Args:
        examples: the images.
        maps: of each image, at model resolution.
        loco: whether AU-sPRO is wanted, which needs saturation areas.
        title: of the progress bar.
    """
    stream = PixelStream()
    for i in progress(range(len(examples)), title):
        truth = examples.ground_truth(i)
        if not truth.known:
            continue
        large = resize_map(maps[i], truth.masks.shape[1:])
        if not loco:
            stream.add(large, truth.masks)
            continue
        areas = [
            saturation_area(int(mask.sum()), rule.threshold, relative=rule.relative)
            for mask, rule in zip(truth.masks, truth.saturations, strict=True)
        ]
        stream.add(large, truth.masks, areas, group=examples.types[i])
    return stream


def measure(stream: PixelStream, *, loco: bool) -> dict[str, float]:
    """Pixel metrics at original resolution.

    Args:
        stream: what `stream_pixels` gave.
        loco: whether to add AU-sPRO of logical and structural anomalies, each with
            all normal images, and the mean of the two.

    Returns:
        Metrics by name; NaN, with a warning, where they are undefined.
    """
    metrics = {
        "pixel_auroc_original": stream.auroc(),
        "aupro_original": stream.aupro(),
    }
    return metrics | (_au_spro(stream) if loco else {})


def write_maps(
    examples: Examples,
    maps: Float32[np.ndarray, "n h w"],
    folder: Path,
    *,
    title: str,
) -> None:
    """Writes `<folder>/test/<type>/<id>.tiff`, float32 at each image's resolution.

    That is what MVTec's evaluation scripts for AD and LOCO read.

    Args:
        examples: the images.
        maps: of each image, at model resolution.
        folder: the category's.
        title: of the progress bar.
    """
    for i in progress(range(len(examples)), title):
        record = examples.records[i]
        large = resize_map(maps[i], examples.ground_truth(i).masks.shape[1:])
        target = folder / "test" / results.file_name(record.type)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(large).save(target / results.file_name(record.stem, ".tiff"))


def _au_spro(stream: PixelStream) -> dict[str, float]:
    """By limit, of the mean of types and of each; `au_spro_0.05` is the headline."""
    logical, structural = (
        stream.au_spro([GOOD, name]) for name in (LOGICAL, STRUCTURAL)
    )
    metrics = {}
    for limit in spro.LIMITS:
        name = f"au_spro_{limit:g}"
        metrics[name] = 0.5 * (logical[limit] + structural[limit])
        metrics[f"{name}/{LOGICAL}"] = logical[limit]
        metrics[f"{name}/{STRUCTURAL}"] = structural[limit]
    return metrics
