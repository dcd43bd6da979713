"""Chooses thresholds on validation normals only, and normalises scores.

An image is anomalous if its score is above the image threshold. A pixel belongs to the
predicted mask if its value is above the pixel threshold, whatever the image's decision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import numpy as np
from scipy import special

from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped

CONFIDENCE = 0.95  # of the upper bound on the false positive rate


@flax.struct.dataclass
class Thresholds:
    """The thresholds that turn scores and maps into decisions.

    Attributes:
        image: threshold of scores; an image with a score above it is anomalous.
        pixel: threshold of maps; a pixel with a value above it belongs to the mask.
        zero: score that is normalised to 0.
        half: score that is normalised to 0.5. It is the image threshold that training
            chose, and stays the same if another threshold is given by hand.
    """

    image: float = 0.0
    pixel: float = 0.0
    zero: float = 0.0
    half: float = 1.0


@dataclasses.dataclass(frozen=True)
class Basis:
    """The data and rates behind the thresholds.

    The rates of a threshold given by hand are None.

    Attributes:
        validation_scores: scores of the validation normals, ascending, each computed as
            if the image were new (see `scoring.fuse_as_new`).
        image_fpr: requested share of normal images that are called anomalous.
        image_fpr_expected: guaranteed upper bound on the mean of that share over all
            validation sets that could have been drawn. It is above the requested share
            if there are fewer than 1 / image_fpr - 1 images.
        image_fpr_upper: upper bound on that share with 95 % confidence.
        pixel_fpr: requested share of normal images' pixels in the mask.
        pixel_fpr_error: standard error of that share, from its spread over the
            validation images; None for a single image.
    """

    validation_scores: tuple[float, ...]
    image_fpr: float | None
    image_fpr_expected: float | None
    image_fpr_upper: float | None
    pixel_fpr: float | None
    pixel_fpr_error: float | None


@dataclasses.dataclass(frozen=True)
class Decisions:
    """The thresholds and their basis, as they are stored with a run.

    Attributes:
        thresholds: thresholds of scores and maps.
        basis: data and rates behind the thresholds.
    """

    thresholds: Thresholds
    basis: Basis

    def to_json(self) -> dict[str, Any]:
        """Returns the decisions as JSON-compatible numbers, lists and None."""
        return {
            "thresholds": dataclasses.asdict(self.thresholds),
            "basis": dataclasses.asdict(self.basis),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Decisions:
        """Returns the decisions from the result of `to_json`."""
        scores = tuple(document["basis"]["validation_scores"])
        return cls(
            Thresholds(**document["thresholds"]),
            Basis(**document["basis"] | {"validation_scores": scores}),
        )

    def override(
        self, *, image: float | None = None, pixel: float | None = None
    ) -> Decisions:
        """Returns decisions with thresholds given by hand, whose rates are unknown.

        The normalised score does not change.

        Args:
            image: image threshold; None to keep the present one.
            pixel: pixel threshold; None to keep the present one.

        Raises:
            UserError: a threshold is not finite.
        """
        for name, value in (("image", image), ("pixel", pixel)):
            if value is not None and not math.isfinite(value):
                raise UserError(
                    f"Expected the {name} threshold to be a finite number, found "
                    f"{value}. Give a value between the scores in scores.csv."
                )
        thresholds, basis = self.thresholds, self.basis
        if image is not None:
            thresholds = thresholds.replace(image=float(image))
            rates = dict.fromkeys(
                ("image_fpr", "image_fpr_expected", "image_fpr_upper")
            )
            basis = dataclasses.replace(basis, **rates)
        if pixel is not None:
            thresholds = thresholds.replace(pixel=float(pixel))
            basis = dataclasses.replace(basis, pixel_fpr=None, pixel_fpr_error=None)
        return Decisions(thresholds, basis)


def choose(
    maps: Float[np.ndarray, "n h w"],
    scores: Float[np.ndarray, " n"],
    *,
    image_fpr: float,
    pixel_fpr: float,
) -> Decisions:
    """Chooses both thresholds on the maps and scores of n validation normals.

    The image threshold is split conformal prediction's quantile (Vovk, Gammerman &
    Shafer, "Algorithmic Learning in a Random World", 2005): the k-th of the scores in
    ascending order, k = min(n, ceil((n + 1) (1 - image_fpr))). If a new normal image
    and the validation images are exchangeable, its score is above that with a
    probability of at most (n + 1 - k) / (n + 1), averaged over validation sets. If n is
    too small for the requested rate, k = n: the threshold is the largest score, and
    1 / (n + 1) is the smallest rate that can be guaranteed. The tail is not
    extrapolated. For the one validation set at hand the rate is distributed like
    Beta(n + 1 - k, k) (scores without ties), of which the 0.95 quantile is recorded
    as well.

    The pixel threshold is the smallest value that at most a share `pixel_fpr` of all
    pixels is above. Pixels of one image are not independent, so this is an estimate
    with a standard error, and not a guarantee.

    The normalised score is 0 at the median of the validation scores and 0.5 at the
    image threshold.

    Args:
        maps: [n, h, w], each computed as if its image were new, see
            `calibration.fuse_as_new`.
        scores: [n], computed likewise.
        image_fpr: share of normal images called anomalous, in (0, 1).
        pixel_fpr: share of normal images' pixels in the mask, in (0, 1).
    """
    scores = np.sort(scores)
    n = len(scores)
    # - 1e-9: a rounding error must not raise k.
    k = min(n, max(1, math.ceil((n + 1) * (1 - image_fpr) - 1e-9)))
    image = float(scores[k - 1])
    last = maps.size - 1 - int(pixel_fpr * maps.size + 1e-9)  # in ascending order
    pixel = np.partition(maps, last, axis=None)[last]
    shares = (maps > pixel).mean((1, 2))
    zero = float(np.median(scores))
    if not image - zero > 1e-6:  # equal scores define no unit
        zero = image - 1.0
    basis = Basis(
        validation_scores=tuple(scores.tolist()),
        image_fpr=image_fpr,
        image_fpr_expected=(n + 1 - k) / (n + 1),
        image_fpr_upper=float(special.betaincinv(n + 1 - k, k, CONFIDENCE)),
        pixel_fpr=pixel_fpr,
        pixel_fpr_error=float(shares.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
    )
    return Decisions(Thresholds(image, float(pixel), zero, image), basis)


def normalize(
    score: Float[np.ndarray, " b"], thresholds: Thresholds
) -> Float[np.ndarray, " b"]:
    """Returns 0.5 (score - zero) / (half - zero), of NumPy or JAX arrays.

    The result is not clipped, because clipping would tie the most extreme images.
    """
    unit = thresholds.half - thresholds.zero
    return 0.5 * ((score - thresholds.zero) / unit)


def rates(
    positive: Shaped[np.ndarray, "*n"], decided: Bool[np.ndarray, "*n"]
) -> tuple[float, float]:
    """Returns the true and false positive rates; NaN if there is nothing to count.

    Args:
        positive: labels of images or pixels, non-zero for anomalous ones.
        decided: boolean array, True for those that were called anomalous.
    """
    positive = positive.astype(bool)
    counts = [np.count_nonzero(of) for of in (positive, ~positive)]
    found = [np.count_nonzero(decided & of) for of in (positive, ~positive)]
    tpr, fpr = (f / c if c else math.nan for f, c in zip(found, counts, strict=True))
    return tpr, fpr
