"""Pixel-level metrics at original resolution, one image at a time.

Memory does not grow with the number of images: up to four million scores are kept,
and more go to a histogram of float32 numbers, whose bins are narrow where scores crowd.
`PixelStream.error_bound` says how much that can change a result, and
`benchmarks/spro.py` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ulsad_jax.metrics import spro
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

NORMAL, DEFECTIVE, REGIONS, CHANNELS = "normal", "defective", "regions", "channels"


class PixelStream:
    """Pixel AUROC, AUPRO and AU-sPRO of images of any number and size.

    Images belong to groups, such as their types. AU-sPRO and curves are of the groups
    that are named, or of all.
    """

    def __init__(self, *, max_bins: int = 1 << 22):
        """Makes an empty stream.

        Args:
            max_bins: of the histogram; it takes at most 40 bytes a bin and group.
        """
        self._histogram = ScoreHistogram(max_bins=max_bins)
        self._groups: dict[Hashable, None] = {}

    def add(
        self,
        anomaly_map: Num[np.ndarray, "h w"],
        channels: Bool[np.ndarray, "c h w"],
        saturation_areas: Sequence[float] | None = None,
        *,
        group: Hashable = "",
    ) -> None:
        """Takes one image.

        Args:
            anomaly_map: at the image's resolution, read as float32; larger means
                more anomalous.
            channels: of the ground truth; none, or empty ones, for a normal image.
            saturation_areas: of each channel in pixels (`regions.saturation_area`);
                None if AU-sPRO is not wanted.
            group: what the image belongs to.

        Raises:
            ValueError: see `regions.check_image`. Nothing was added then.
        """
        anomaly_map = np.asarray(anomaly_map, np.float32)
        check_image(anomaly_map, channels, saturation_areas)
        self._groups[group] = None
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
        """The area under the ROC curve of all pixels; NaN unless both classes occur."""
        curve = self.curve(DEFECTIVE)
        if curve is None:
            _warn("Pixel AUROC at original resolution")
            return math.nan
        return area_up_to(curve, 1)

    def aupro(self, *, fpr_limit: float = 0.3) -> float:
        """As `pixel.aupro`, of the unions of the channels."""
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
        """As `spro.au_spro`: limit -> AU-sPRO."""
        curve = self.curve(CHANNELS, groups)
        if curve is None:
            of = "" if groups is None else f" of {', '.join(map(str, groups))}"
            return spro.undefined(f"AU-sPRO{of}", limits, stacklevel=2)
        return spro.areas_under(curve, limits)

    def curve(
        self, overlap: str, groups: Sequence[Hashable] | None = None
    ) -> Curve | None:
        """A curve over the false positive rate, of one point a bin.

        Args:
            overlap: DEFECTIVE for the true positive rate, REGIONS for PRO, CHANNELS
                for sPRO.
            groups: of the images; all by default.

        Returns:
            The curve; None without any normal pixel or anything to overlap with.
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
        """How much the bins can have changed an area; for data that defines it."""
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
