"""Computes pixel-level metrics over all pixels of all test images.

Normal images are included. A larger value of a map means more anomalous, and equal
values are one point of a curve. All metrics come from one sort of all pixels,
O(N log N), without binning or resampling. A metric that the masks leave undefined is
NaN, with an `UndefinedMetricWarning`; never 0 or 1.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ulsad_jax.metrics.base import MODEL, PIXEL, Metric
from ulsad_jax.metrics.curves import (
    Curve,
    area_up_to,
    check_finite,
    check_limit,
    find_tie_ends,
)
from ulsad_jax.metrics.image import find_best_f1, is_undefined
from ulsad_jax.metrics.regions import weigh_regions
from ulsad_jax.metrics.stream import PixelStream

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num

NAMES = ("auroc", "average_precision", "f1_max", "f1_max_threshold", "aupro")


def pixel_metrics(
    masks: Bool[np.ndarray, "n h w"],
    maps: Float[np.ndarray, "n h w"],
    *,
    fpr_limit: float = 0.3,
) -> dict[str, float]:
    """Returns all pixel-level metrics from one sort.

    Args:
        masks: boolean [n, h, w], True for defective pixels; all False for a normal
            image.
        maps: float [n, h, w], finite; larger means more anomalous.
        fpr_limit: false positive rate up to which `aupro` integrates, in (0, 1].

    Returns:
        `auroc`, `average_precision` (a step sum), `f1_max`, its `f1_max_threshold` t
        (`maps >= t` is called defective; the largest t if several are best), as
        scikit-learn defines them on the flattened pixels, and `aupro`. All are NaN
        unless there are both defective and normal pixels.

    Raises:
        ValueError: an argument is invalid; see `aupro`.
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
    """Returns the exact area under the per-region-overlap curve.

    Bergmann et al., "The MVTec Anomaly Detection Dataset: A Comprehensive Real-World
    Dataset for Unsupervised Anomaly Detection", IJCV 2021. A region is an 8-connected
    component of a mask. At a threshold t, PRO is the mean over all regions of the
    share of the region with map >= t, and FPR is the share of all normal pixels with
    map >= t. The curve starts at (0, 0), is linear between thresholds, and its area
    up to `fpr_limit` is divided by `fpr_limit`.

    Args:
        masks: boolean [n, h, w], True for defective pixels; all False for a normal
            image.
        maps: float [n, h, w], finite; larger means more anomalous.
        fpr_limit: false positive rate at which the integral ends, in (0, 1].

    Returns:
        The area in [0, 1]; NaN unless there are both defective and normal pixels.

    Raises:
        ValueError: the shapes differ, the masks are not boolean, a value of a map is
            not finite, or the limit is outside (0, 1].
    """
    masks, maps = _check(masks, maps, fpr_limit)
    if is_undefined("AUPRO", masks, unit="pixel"):
        return math.nan
    return _area_under_pro(_sweep(masks, maps), fpr_limit)


class Pixels:
    """The pixels of images of one size, with exact areas."""

    def __init__(
        self, masks: Bool[np.ndarray, "n h w"], maps: Float[np.ndarray, "n h w"]
    ):
        """Stores the pixels of all images.

        Args:
            masks: boolean [n, h, w]; see `pixel_metrics`.
            maps: float [n, h, w]; see `pixel_metrics`.
        """
        self._masks, self._maps = masks, maps

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """The result of `pixel_metrics`."""
        return pixel_metrics(self._masks, self._maps)

    def auroc(self) -> float:
        """Returns the area under the ROC curve of all pixels."""
        return self.metrics["auroc"]

    def aupro(self) -> float:
        """Returns the area under the per-region-overlap curve, see `aupro`."""
        return self.metrics["aupro"]

    @functools.cached_property
    def stream(self) -> PixelStream:
        """A `PixelStream` of the same pixels."""
        stream = PixelStream()
        for mask, anomaly_map in zip(self._masks, self._maps, strict=True):
            stream.add(anomaly_map, mask[None])
        return stream

    def curve(self, overlap: str) -> Curve | None:
        """Returns a curve over the false positive rate, see `PixelStream.curve`."""
        return self.stream.curve(overlap)


class _Sweep(NamedTuple):
    """Counts and overlaps at each distinct threshold, the largest first.

    Attributes:
        thresholds: distinct values of the maps, [k].
        true_positives: number of defective pixels >= the threshold, [k].
        predicted: number of pixels >= the threshold, [k].
        pro: mean over regions of the share of the region >= the threshold, [k].
    """

    thresholds: Num[np.ndarray, " k"]
    true_positives: Int[np.ndarray, " k"]
    predicted: Int[np.ndarray, " k"]
    pro: Float[np.ndarray, " k"]


def _sweep(masks: Bool[np.ndarray, "n h w"], maps: Num[np.ndarray, "n h w"]) -> _Sweep:
    """Returns the sweep over all thresholds; there is at least one region."""
    ascending = np.sort(maps, axis=None)
    # Sorting values without their pixels is several times faster. The places of the
    # few defective pixels are then looked up.
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
    """Returns 1 / (size of its region) of each defective pixel, in `masks`' order."""
    defective = masks.any(axis=(1, 2))
    return np.concatenate([weigh_regions(mask) for mask in masks[defective]])


def _area(curve: _Sweep) -> float:
    """Returns the area under the ROC curve.

    It sums counts and divides at the end, so that the sums are exact.
    """
    false_positives = curve.predicted - curve.true_positives
    area = np.trapezoid(
        np.append(0, curve.true_positives), np.append(0, false_positives)
    )
    return float(area / curve.true_positives[-1] / false_positives[-1])


def _average_precision(curve: _Sweep) -> float:
    """Returns Σ (R_k - R_{k-1}) P_k."""
    precision = curve.true_positives / curve.predicted
    gained = np.diff(curve.true_positives, prepend=0)
    return float(gained @ precision / curve.true_positives[-1])


def _area_under_pro(curve: _Sweep, fpr_limit: float) -> float:
    """Returns the area under PRO over FPR up to the limit, divided by the limit."""
    false_positives = curve.predicted - curve.true_positives
    fpr = np.append(0, false_positives / false_positives[-1])
    return area_up_to(Curve(fpr, np.append(0, curve.pro)), fpr_limit)


def _check(
    masks: Bool[np.ndarray, "n h w"], maps: Num[np.ndarray, "n h w"], fpr_limit: float
) -> tuple[Bool[np.ndarray, "n h w"], Num[np.ndarray, "n h w"]]:
    """Checks the arguments of the public functions, and returns NumPy arrays."""
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


METRICS = {
    "pixel_auroc": Metric("pixel AUROC", PIXEL, lambda pixels: pixels.auroc()),
    **{
        f"pixel_{name}": Metric(
            title,
            PIXEL,
            lambda pixels, name=name: pixels.metrics[name],
            resolutions=(MODEL,),
        )
        for name, title in (
            ("average_precision", "pixel AP"),
            ("f1_max", "pixel F1"),
            ("f1_max_threshold", ""),
        )
    },
    "aupro": Metric("AUPRO", PIXEL, lambda pixels: pixels.aupro()),
}
