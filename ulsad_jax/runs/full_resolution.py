"""Measures maps at the images' own resolution, and writes them for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ulsad_jax.data.batches import Examples
from ulsad_jax.data.resize import resize_map
from ulsad_jax.metrics.regions import saturation_area
from ulsad_jax.metrics.stream import PixelStream
from ulsad_jax.runtime import files
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

    Maps are resized bilinearly, one at a time; masks keep their size.

    Args:
        examples: test images.
        maps: anomaly map of each image, at model resolution.
        loco: True to prepare AU-sPRO, which needs saturation areas.
        title: title of the progress bar.
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


def write_maps(
    examples: Examples,
    maps: Float32[np.ndarray, "n h w"],
    folder: Path,
    *,
    title: str,
) -> None:
    """Writes `<folder>/test/<type>/<id>.tiff`, float32 at each image's resolution.

    MVTec's evaluation scripts for AD and LOCO read this format.

    Args:
        examples: test images.
        maps: anomaly map of each image, at model resolution.
        folder: folder of the category's maps.
        title: title of the progress bar.
    """
    for i in progress(range(len(examples)), title):
        record = examples.records[i]
        large = resize_map(maps[i], examples.ground_truth(i).masks.shape[1:])
        target = folder / "test" / files.safe_name(record.type)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(large).save(target / files.safe_name(record.stem, ".tiff"))
