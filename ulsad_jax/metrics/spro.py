"""Computes AU-sPRO of MVTec LOCO AD exactly, for data that fits in memory.

Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised
Anomaly Detection and Localization", IJCV 2022, and MVTec's evaluation of it. Each
ground-truth channel of an image is one defect, of which a part, the saturation area,
suffices: sPRO = min(pixels of the channel at or above the threshold / saturation
area, 1). FPR is the share of all pixels outside every channel that are at or above
the threshold. AU-sPRO is the area under the mean of sPRO over all channels, up to an
FPR limit, divided by the limit. `stream.PixelStream` computes it for data of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ulsad_jax.metrics.curves import (
    Curve,
    area_up_to,
    check_limit,
    find_tie_ends,
    make_curve,
    warn_undefined,
)
from ulsad_jax.metrics.regions import check_image, weigh_channel

if TYPE_CHECKING:
    from jaxtyping import Bool, Num

LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)  # FPR limits of MVTec's evaluation


def au_spro(
    maps: Sequence[Num[np.ndarray, "_h _w"]],
    channels: Sequence[Bool[np.ndarray, "_c _h _w"]],
    saturation_areas: Sequence[Sequence[float]],
    *,
    limits: Sequence[float] = LIMITS,
) -> dict[float, float]:
    """Returns the AU-sPRO of images, which may differ in size.

    Args:
        maps: map [h, w] of each image, at its original resolution; larger means more
            anomalous.
        channels: boolean channels [c, h, w] of each image; none for a normal image.
            Channels may overlap.
        saturation_areas: areas of the channels of each image, in pixels
            (`regions.saturation_area`).
        limits: FPR limits in (0, 1].

    Returns:
        AU-sPRO in [0, 1] by limit; NaN unless there are channels and normal pixels.

    Raises:
        ValueError: an image is invalid, see `regions.check_image`; or a limit is
            outside (0, 1].
    """
    scores, normal, weights = [np.zeros(0, np.float32)], [np.zeros(0)], [np.zeros(0)]
    for image, masks, areas in zip(maps, channels, saturation_areas, strict=True):
        check_image(image, masks, areas)
        scores.append(image[~masks.any(0)])
        normal.append(np.ones(len(scores[-1])))
        weights.append(np.zeros(len(scores[-1])))
        for mask, area in zip(masks, areas, strict=True):
            found, credit = weigh_channel(image[mask], area)
            scores.append(found)
            normal.append(np.zeros(len(found)))
            weights.append(credit)
    order = np.argsort(np.concatenate(scores))[::-1]
    descending = np.concatenate(scores)[order]
    sums = [np.cumsum(np.concatenate(v)[order]) for v in (normal, weights)]
    if not order.size or not (sums[0][-1] and sums[1][-1]):
        return undefined("AU-sPRO", limits, stacklevel=2)
    ends = find_tie_ends(descending)
    curve = make_curve(*(np.diff(s[ends], prepend=0) for s in sums))
    return areas_under(curve, limits)


def areas_under(curve: Curve, limits: Sequence[float]) -> dict[float, float]:
    """Returns the area under a curve by limit."""
    for limit in limits:
        check_limit(limit)
    return {limit: area_up_to(curve, limit) for limit in limits}


def undefined(
    metric: str, limits: Sequence[float], *, stacklevel: int
) -> dict[float, float]:
    """Returns NaN by limit, with one warning."""
    needs = "normal pixels and ground-truth channels, found none of one or both"
    warn_undefined(metric, needs, stacklevel=stacklevel + 1)
    return dict.fromkeys(limits, math.nan)
