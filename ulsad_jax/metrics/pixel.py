"""Pixel-level metrics over all pixels of all test images, normal images included.

A larger value of a map means more anomalous, and equal values are one point of a
curve. Everything comes from one sort of all pixels, O(N log N), without binning or
resampling. A metric that the masks leave undefined is NaN, with an
`UndefinedMetricWarning`; never 0 or 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ulsad_jax.metrics.curves import (
    Curve,
    area_up_to,
    check_finite,
    check_limit,
    find_tie_ends,
)
from ulsad_jax.metrics.image import find_best_f1, is_undefined
from ulsad_jax.metrics.regions import weigh_regions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num

NAMES = ("auroc", "average_precision", "f1_max", "f1_max_threshold", "aupro")


def pixel_metrics(
    masks: Bool[np.ndarray, "n h w"],
    maps: Float[np.ndarray, "n h w"],
    *,
    fpr_limit: float = 0.3,
) -> dict[str, float]:
    """All pixel-level metrics from one sort.

    Args:
        masks: whether each pixel is defective; all False for a normal image.
        maps: finite; larger means more anomalous.
        fpr_limit: where the integral of `aupro` ends, in (0, 1].

    Returns:
        `auroc`, `average_precision` (a step sum), `f1_max`, its `f1_max_threshold` t
        (`maps >= t` is called defective; the largest t if several are best), as
        scikit-learn defines them on the flattened pixels, and `aupro`. All are NaN
        unless there are both defective and normal pixels.

    Raises:
        ValueError: see `aupro`.
    """
    masks, maps = _check(masks, maps, fpr_limit)
    if is_undefined(f"Each of {', '.join(NAMES)}", masks, unit="pixel"):
        return dict.fromkeys(NAMES, math.nan)
    curve = _sweep(masks, maps)
    f1, threshold = find_best_f1(
        curve.true_positives, curve.predicted, curve.thresholds
    )
    return {
        "auroc": _area(curve),
        "average_precision": _average_precision(curve),
        "f1_max": f1,
        "f1_max_threshold": threshold,
        "aupro": _area_under_pro(curve, fpr_limit),
    }


def aupro(
    masks: Bool[np.ndarray, "n h w"],
    maps: Float[np.ndarray, "n h w"],
    *,
    fpr_limit: float = 0.3,
) -> float:
    """The area under the per-region-overlap curve, exactly.

    Bergmann et al., "The MVTec Anomaly Detection Dataset: A Comprehensive Real-World
    Dataset for Unsupervised Anomaly Detection", IJCV 2021. A region is an 8-connected
    component of a mask. At a threshold t, PRO is the mean over all regions of the
    share of the region with map >= t, and FPR the share of all normal pixels with
    map >= t. The curve starts at (0, 0), is linear between thresholds, and its area
    up to `fpr_limit` is divided by `fpr_limit`.

    Args:
        masks: whether each pixel is defective; all False for a normal image.
        maps: finite; larger means more anomalous.
        fpr_limit: where the integral ends, in (0, 1].

    Returns:
        In [0, 1]; NaN unless there are both defective and normal pixels.

    Raises:
        ValueError: shapes that differ, masks that are not boolean, a value of a map
            that is not finite, a limit outside (0, 1].
    """
    masks, maps = _check(masks, maps, fpr_limit)
    if is_undefined("AUPRO", masks, unit="pixel"):
        return math.nan
    return _area_under_pro(_sweep(masks, maps), fpr_limit)


class _Sweep(NamedTuple):
    """What holds at each distinct threshold, the largest first.

    Attributes:
        thresholds: distinct values of the maps.
        true_positives: how many defective pixels are >= the threshold.
        predicted: how many pixels are.
        pro: the mean over regions of the share of the region that is.
    """

    thresholds: Num[np.ndarray, " k"]
    true_positives: Int[np.ndarray, " k"]
    predicted: Int[np.ndarray, " k"]
    pro: Float[np.ndarray, " k"]


def _sweep(masks: Bool[np.ndarray, "n h w"], maps: Num[np.ndarray, "n h w"]) -> _Sweep:
    """Lowers the threshold through all values; there is at least one region."""
    ascending = np.sort(maps, axis=None)
    # All values are sorted without their pixels, which is several times faster; the
    # defective pixels, of which there are few, then look up where theirs are.
    starts = np.append(0, find_tie_ends(ascending)[:-1] + 1)
    thresholds = ascending[starts]
    places = np.searchsorted(thresholds, maps[masks])
    count = len(thresholds)
    weights = np.bincount(places, _weigh_all(masks), count)[::-1]
    # The weights add up to the number of regions, so that dividing by the last sum
    # gives the mean, and an end of exactly 1.
    pro = np.cumsum(weights)
    return _Sweep(
        thresholds=thresholds[::-1],
        true_positives=np.cumsum(np.bincount(places, minlength=count)[::-1]),
        predicted=maps.size - starts[::-1],
        pro=pro / pro[-1],
    )


def _weigh_all(masks: Bool[np.ndarray, "n h w"]) -> Float[np.ndarray, " k"]:
    """1 / (size of its region) of each defective pixel, in the order of `masks`."""
    defective = masks.any(axis=(1, 2))
    return np.concatenate([weigh_regions(mask) for mask in masks[defective]])


def _area(curve: _Sweep) -> float:
    """The area under the ROC curve; counts until the end, for exact sums."""
    false_positives = curve.predicted - curve.true_positives
    area = np.trapezoid(
        np.append(0, curve.true_positives), np.append(0, false_positives)
    )
    return float(area / curve.true_positives[-1] / false_positives[-1])


def _average_precision(curve: _Sweep) -> float:
    """Σ (R_k - R_{k-1}) P_k."""
    precision = curve.true_positives / curve.predicted
    gained = np.diff(curve.true_positives, prepend=0)
    return float(gained @ precision / curve.true_positives[-1])


def _area_under_pro(curve: _Sweep, fpr_limit: float) -> float:
    """The area under PRO over FPR up to the limit, divided by it."""
    false_positives = curve.predicted - curve.true_positives
    fpr = np.append(0, false_positives / false_positives[-1])
    return area_up_to(Curve(fpr, np.append(0, curve.pro)), fpr_limit)


def _check(
    masks: Bool[np.ndarray, "n h w"], maps: Num[np.ndarray, "n h w"], fpr_limit: float
) -> tuple[Bool[np.ndarray, "n h w"], Num[np.ndarray, "n h w"]]:
    """Checks what the public functions are given."""
    masks, maps = np.asarray(masks), np.asarray(maps)
    if masks.ndim != 3 or masks.shape != maps.shape:
        raise ValueError(
            f"Expected masks and maps of one shape [n, h, w], found {masks.shape} and "
            f"{maps.shape}."
        )
    if masks.dtype != bool:
        raise ValueError(f"Expected boolean masks, found {masks.dtype}.")
    check_limit(fpr_limit)
    check_finite(maps)
    return masks, maps
