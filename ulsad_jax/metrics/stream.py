"""Computes pixel-level metrics at original resolution, one image at a time.

Memory does not grow with the number of images: up to four million scores are kept
exactly, and more go to a histogram of float32 numbers, whose bins are narrow where
scores are dense. `PixelStream.error_bound` returns how much that can change a result,
and `benchmarks/spro.py` measures it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ulsad_jax.metrics import spro
from ulsad_jax.metrics.base import (
    GOOD,
    LOGICAL,
    ORIGINAL,
    PIXEL,
    STRUCTURAL,
    Metric,
)
from ulsad_jax.metrics.curves import (
    Curve,
    area_up_to,
    check_limit,
    error_bound,
    make_curve,
    warn_undefined,
)
from ulsad_jax.metrics.histogram import ScoreHistogram
from ulsad_jax.metrics.regions import check_image, weigh_channel, weigh_regions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Num

HEADLINE_LIMIT = 0.05  # FPR limit of MVTec LOCO AD's main result
NORMAL, DEFECTIVE, REGIONS, CHANNELS = "normal", "defective", "regions", "channels"


class PixelStream:
    """An accumulator of pixel AUROC, AUPRO and AU-sPRO for images of any size.

    The number of images is not limited. Images belong to groups, such as their types.
    AU-sPRO and curves are computed for the groups that are named, or for all.
    """

    def __init__(self, *, max_bins: int = 1 << 22):
        """Creates an empty stream.

        Args:
            max_bins: largest number of bins of the histogram, which takes at most 40
                bytes per bin and group.
        """
        self._histogram = ScoreHistogram(max_bins=max_bins)
        self._groups: dict[Hashable, None] = {}
        self.has_saturation = False  # True if AU-sPRO is available

    def add(
        self,
        anomaly_map: Num[np.ndarray, "h w"],
        channels: Bool[np.ndarray, "c h w"],
        saturation_areas: Sequence[float] | None = None,
        *,
        group: Hashable = "",
    ) -> None:
        """Adds one image.

        Args:
            anomaly_map: map [h, w] at the image's resolution, converted to float32;
                larger means more anomalous.
            channels: boolean ground truth [c, h, w]; without channels, or with empty
                ones, for a normal image.
            saturation_areas: area of each channel in pixels, see
                `regions.saturation_area`; None if AU-sPRO is not needed.
            group: group of the image.

        Raises:
            ValueError: an argument is invalid, see `regions.check_image`. Nothing is
                added then.
        """
        anomaly_map = np.asarray(anomaly_map, np.float32)
        check_image(anomaly_map, channels, saturation_areas)
        self._groups[group] = None
        self.has_saturation |= saturation_areas is not None
        add = self._histogram.add
        defective = channels.any(0)
        add((group, NORMAL), anomaly_map[~defective])
        if not defective.any():
            return
        scores = anomaly_map[defective]
        add((group, DEFECTIVE), scores)
        add((group, REGIONS), scores, weigh_regions(defective))
        for mask, area in zip(channels, saturation_areas or (), strict=False):
            add((group, CHANNELS), *weigh_channel(anomaly_map[mask], area))

    def auroc(self) -> float:
        """Returns the area under the ROC curve of all pixels.

        It is NaN unless there are both defective and normal pixels.
        """
        curve = self.curve(DEFECTIVE)
        if curve is None:
            _warn("Pixel AUROC at original resolution")
            return math.nan
        return area_up_to(curve, 1)

    def aupro(self, *, fpr_limit: float = 0.3) -> float:
        """Returns the area of `pixel.aupro`, with the unions of channels as masks."""
        check_limit(fpr_limit)
        curve = self.curve(REGIONS)
        if curve is None:
            _warn("AUPRO at original resolution")
            return math.nan
        return area_up_to(curve, fpr_limit)

    def au_spro(
        self,
        groups: Sequence[Hashable] | None = None,
        *,
        limits: Sequence[float] = spro.LIMITS,
    ) -> dict[float, float]:
        """Returns AU-sPRO by limit; see `spro.au_spro`.

        Args:
            groups: groups of images; by default all.
            limits: FPR limits in (0, 1].
        """
        curve = self.curve(CHANNELS, groups)
        if curve is None:
            of = "" if groups is None else f" of {', '.join(map(str, groups))}"
            return spro.undefined(f"AU-sPRO{of}", limits, stacklevel=2)
        return spro.areas_under(curve, limits)

    @functools.cached_property
    def au_spro_by_type(self) -> dict[str, dict[float, float]]:
        """AU-sPRO by limit of logical and of structural anomalies.

        Each includes all normal images. It is computed once, from the images that were
        added before the first access.
        """
        return {name: self.au_spro([GOOD, name]) for name in (LOGICAL, STRUCTURAL)}

    def curve(
        self, overlap: str, groups: Sequence[Hashable] | None = None
    ) -> Curve | None:
        """Returns a curve over the false positive rate, with one point per bin.

        Args:
            overlap: DEFECTIVE for the true positive rate, REGIONS for PRO, CHANNELS
                for sPRO.
            groups: groups of images; by default all.

        Returns:
            The curve; None without normal pixels or without any overlap.
        """
        sums, _ = self._read(overlap, groups)
        return make_curve(*sums) if all(values.any() for values in sums) else None

    def error_bound(
        self,
        overlap: str,
        groups: Sequence[Hashable] | None = None,
        *,
        fpr_limit: float,
    ) -> float:
        """Returns how much the bins can have changed an area that the data defines.

        Args:
            overlap: kind of overlap; see `curve`.
            groups: groups of images; by default all.
            fpr_limit: false positive rate up to which the area is taken.
        """
        sums, binned = self._read(overlap, groups)
        return error_bound(make_curve(*sums), binned, fpr_limit)

    def _read(
        self, overlap: str, groups: Sequence[Hashable] | None
    ) -> tuple[list[Float[np.ndarray, " k"]], Bool[np.ndarray, " k"]]:
        groups = self._groups if groups is None else groups
        names = [[(group, name) for group in groups] for name in (NORMAL, overlap)]
        return self._histogram.read(names)


def _warn(metric: str) -> None:
    needs = "defective and normal pixels, found none of one or both"
    warn_undefined(metric, needs, stacklevel=3)


def _au_spro(stream: PixelStream, limit: float) -> dict[str, float] | None:
    """Returns AU-sPRO of logical and of structural anomalies, and their mean."""
    if not stream.has_saturation:
        return None
    found = {name: areas[limit] for name, areas in stream.au_spro_by_type.items()}
    return {"": 0.5 * (found[LOGICAL] + found[STRUCTURAL]), **found}


METRICS = {
    f"au_spro_{limit:g}": Metric(
        f"AU-sPRO {limit:g}" if limit == HEADLINE_LIMIT else "",
        PIXEL,
        functools.partial(_au_spro, limit=limit),
        resolutions=(ORIGINAL,),
    )
    for limit in spro.LIMITS
}
