"""Areas under curves of an overlap over the false positive rate, and their errors."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num


class UndefinedMetricWarning(UserWarning):
    """A metric is NaN because the data does not define it."""


class Curve(NamedTuple):
    """An overlap over the false positive rate, from (0, 0) to (1, 1).

    Attributes:
        fpr: the share of the normal pixels at or above each threshold.
        overlap: the share of the defects (by whatever measure) that is.
    """

    fpr: Float[np.ndarray, " k"]
    overlap: Float[np.ndarray, " k"]


def make_curve(normal: Num[np.ndarray, " n"], overlap: Num[np.ndarray, " n"]) -> Curve:
    """The curve from what lies at each score, the largest first; neither sum is 0.

    Args:
        normal: how many normal pixels have the score.
        overlap: what the defective pixels of the score add to the overlap.
    """
    sums = (np.cumsum(np.append(0, values)) for values in (normal, overlap))
    return Curve(*(s / s[-1] for s in sums))


def area_up_to(curve: Curve, limit: float) -> float:
    """The area up to the false positive rate `limit`, divided by it.

    By trapezoids, with linear interpolation at the limit.
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
    """At most 200 of a curve's points, for drawing: evenly along its way."""
    way = curve.fpr + curve.overlap  # both only grow
    kept = np.searchsorted(way, np.linspace(0, way[-1], 200))
    kept = np.unique(np.append(0, kept))  # equal points before it are the origin
    return Curve(curve.fpr[kept], curve.overlap[kept])


def error_bound(curve: Curve, binned: Bool[np.ndarray, " n"], limit: float) -> float:
    """How far `area_up_to` can be from the area of the exact curve.

    Across a bin of several scores the exact curve grows, so that it stays inside the
    rectangle that the bin's ends span, of which the trapezoid has a half. Of the bin
    that the limit cuts, whose height at the limit is not known, all counts.

    Args:
        curve: of n bins, and so of n + 1 points.
        binned: whether each bin may hold several scores.
        limit: as in `area_up_to`.
    """
    inside = np.minimum(curve.fpr, limit)
    cut = (curve.fpr[1:] > limit) & (curve.fpr[:-1] < limit)
    area = np.diff(inside) * np.diff(curve.overlap) * np.where(cut, 1, 0.5)
    return float(area @ binned / limit)


def find_tie_ends(descending: Num[np.ndarray, " n"]) -> Int[np.ndarray, " k"]:
    """The index of the last of each run of equal scores; n >= 1."""
    changes = np.flatnonzero(descending[1:] != descending[:-1])
    return np.append(changes, descending.size - 1)


def check_finite(scores: Num[np.ndarray, "..."]) -> None:
    """Raises a ValueError that counts the scores that are NaN or infinite."""
    finite = np.isfinite(scores)
    if finite.all():
        return
    first = tuple(int(i) for i in np.argwhere(~finite)[0])
    raise ValueError(
        f"Expected finite scores, found {np.count_nonzero(~finite)} of {scores.size} "
        f"NaN or infinite, the first at index {first[0] if len(first) == 1 else first}."
    )


def check_limit(limit: float) -> None:
    """Raises a ValueError unless a false positive rate can be integrated up to it."""
    if not 0 < limit <= 1:
        raise ValueError(f"Expected fpr_limit in (0, 1], found {limit}.")


def warn_undefined(metric: str, needs: str, *, stacklevel: int) -> None:
    """Warns that a metric is NaN.

    Args:
        metric: what is undefined.
        needs: what it needs, and what was found instead.
        stacklevel: of the frame to name, seen from the caller.
    """
    warnings.warn(
        f"{metric} is undefined and set to NaN: it needs {needs}.",
        UndefinedMetricWarning,
        stacklevel=stacklevel + 1,
    )
