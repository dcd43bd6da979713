"""Computes areas under curves of an overlap over the false positive rate.

It also bounds their errors.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num


class UndefinedMetricWarning(UserWarning):
    """A warning that a metric is NaN because the data does not define it."""


class Curve(NamedTuple):
    """An overlap over the false positive rate, from (0, 0) to (1, 1).

    Attributes:
        fpr: share of the normal pixels at or above each threshold, [k].
        overlap: share of the defects at or above each threshold, [k], by any measure.
    """

    fpr: Float[np.ndarray, " k"]
    overlap: Float[np.ndarray, " k"]


def make_curve(normal: Num[np.ndarray, " n"], overlap: Num[np.ndarray, " n"]) -> Curve:
    """Returns the curve of normal pixels and overlap per score.

    Both arrays are in the order of the scores, the largest first. Neither sum is 0.

    Args:
        normal: number of normal pixels with each score, [n].
        overlap: overlap that the defective pixels with each score add, [n].
    """
    sums = (np.cumsum(np.append(0, values)) for values in (normal, overlap))
    return Curve(*(s / s[-1] for s in sums))


def area_up_to(curve: Curve, limit: float) -> float:
    """Returns the area up to the false positive rate `limit`, divided by `limit`.

    The area is computed by trapezoids, with linear interpolation at the limit.
    """
    fpr, overlap = curve
    inside = np.searchsorted(fpr, limit, side="right")
    around = slice(inside - 1, inside + 1)
    end = np.interp(limit, fpr[around], overlap[around])
    area = np.trapezoid(
        np.append(overlap[:inside], end), np.append(fpr[:inside], limit)
    )
    return float(area / limit)


def thin(curve: Curve) -> Curve:
    """Returns at most 200 points of a curve for drawing, evenly spaced along it."""
    way = curve.fpr + curve.overlap  # both never decrease
    kept = np.searchsorted(way, np.linspace(0, way[-1], 200))
    kept = np.unique(np.append(0, kept))  # equal points before it are the origin
    return Curve(curve.fpr[kept], curve.overlap[kept])


def error_bound(curve: Curve, binned: Bool[np.ndarray, " n"], limit: float) -> float:
    """Returns a bound on the error of `area_up_to` against the exact curve.

    Within a bin of several scores the exact curve increases, so it stays inside the
    rectangle that the bin's ends span. The trapezoid covers half of the rectangle, so
    the error is at most the other half. The bin that contains the limit counts in full,
    because the height of the exact curve at the limit is not known.

    Args:
        curve: curve of n bins, which has n + 1 points.
        binned: bool [n], True for bins that may hold several scores.
        limit: false positive rate up to which the area is taken.
    """
    inside = np.minimum(curve.fpr, limit)
    cut = (curve.fpr[1:] > limit) & (curve.fpr[:-1] < limit)
    area = np.diff(inside) * np.diff(curve.overlap) * np.where(cut, 1, 0.5)
    return float(area @ binned / limit)


def find_tie_ends(descending: Num[np.ndarray, " n"]) -> Int[np.ndarray, " k"]:
    """Returns the index of the last element of each run of equal scores.

    Args:
        descending: sorted scores [n], n >= 1.
    """
    changes = np.flatnonzero(descending[1:] != descending[:-1])
    return np.append(changes, descending.size - 1)


def check_finite(scores: Num[np.ndarray, "..."]) -> None:
    """Raises a ValueError if scores are NaN or infinite; the message counts them."""
    finite = np.isfinite(scores)
    if finite.all():
        return
    first = tuple(int(i) for i in np.argwhere(~finite)[0])
    raise ValueError(
        f"Expected finite scores, found {np.count_nonzero(~finite)} of {scores.size} "
        f"NaN or infinite, the first at index {first[0] if len(first) == 1 else first}."
    )


def check_limit(limit: float) -> None:
    """Raises a ValueError if a limit of the false positive rate is not in (0, 1]."""
    if not 0 < limit <= 1:
        raise ValueError(f"Expected fpr_limit in (0, 1], found {limit}.")


def warn_undefined(metric: str, needs: str, *, stacklevel: int) -> None:
    """Warns that a metric is NaN.

    Args:
        metric: name of the undefined metric.
        needs: text that says what the metric needs, and what was found instead.
        stacklevel: frame that the warning names, counted from the caller.
    """
    warnings.warn(
        f"{metric} is undefined and set to NaN: it needs {needs}.",
        UndefinedMetricWarning,
        stacklevel=stacklevel + 1,
    )
