"""Weighs defective pixels by their region (PRO) or their channel (sPRO)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from ulsad_jax.metrics.curves import check_finite

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Num


def weigh_regions(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, " k"]:
    """Returns 1 / (size of its region) of each defective pixel, in `mask`'s order.

    A region is an 8-connected component.
    """
    regions, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    regions = regions[mask]
    return 1 / np.bincount(regions)[regions]


def weigh_channel(
    scores: Num[np.ndarray, " n"], saturation_area: float
) -> tuple[Num[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Returns the scores of a channel that raise its sPRO, and their weights.

    As the threshold falls, sPRO = min(pixels found / saturation area, 1) grows by
    1 / saturation area per pixel until it is 1. The weights are these increments.

    Args:
        scores: scores of the channel's pixels, [n].
        saturation_area: number of pixels that suffice for full credit, in (0, n].

    Returns:
        (the largest scores [k], descending; their weights [k]).
    """
    enough = math.ceil(saturation_area)
    credit = np.minimum(np.arange(enough + 1) / saturation_area, 1)
    return np.sort(scores)[::-1][:enough], np.diff(credit)


def saturation_area(area: int, threshold: float, *, relative: bool) -> float:
    """Returns the number of pixels of a channel that suffice for full credit.

    It follows MVTec's evaluation of LOCO. A relative area that would be 0, with an
    undefined sPRO, is 1.

    Args:
        area: area of the channel in pixels.
        threshold: number of pixels, or a share of the area.
        relative: True if `threshold` is a share.
    """
    return max(1, int(threshold * area)) if relative else min(threshold, area)


def check_image(
    anomaly_map: Num[np.ndarray, "h w"],
    channels: Bool[np.ndarray, "c h w"],
    saturation_areas: Sequence[float] | None,
) -> None:
    """Checks the map and the ground truth of one image.

    Args:
        anomaly_map: map [h, w].
        channels: ground-truth channels [c, h, w].
        saturation_areas: saturation area of each channel in pixels, or None.

    Raises:
        ValueError: the shapes do not fit, the channels are not boolean, the number of
            areas is not that of channels, an area is outside (0, the channel's area],
            or a value of the map is not finite.
    """
    if anomaly_map.ndim != 2 or channels.shape[1:] != anomaly_map.shape:
        raise ValueError(
            "Expected a map [h, w] and channels [c, h, w] of one size, found "
            f"{anomaly_map.shape} and {channels.shape}."
        )
    if channels.dtype != bool:
        raise ValueError(f"Expected boolean channels, found {channels.dtype}.")
    check_finite(anomaly_map)
    if saturation_areas is None:
        return
    sizes = channels.sum((1, 2)).tolist()
    if len(saturation_areas) != len(sizes) or not all(
        0 < area <= size for area, size in zip(saturation_areas, sizes, strict=True)
    ):
        raise ValueError(
            "Expected a saturation area for each channel, above 0 and up to the "
            f"channel's area, found {list(saturation_areas)} for areas of {sizes}."
        )
