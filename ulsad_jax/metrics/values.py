"""Averages metrics by name, and converts undefined ones to JSON and back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np


def mean_row(categories: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean over categories of every metric, ignoring NaN."""
    names = dict.fromkeys(name for row in categories.values() for name in row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN: stays NaN
        return {
            name: float(
                np.nanmean([r.get(name, math.nan) for r in categories.values()])
            )
            for name in names
        }


def finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """Returns metrics for JSON, in which an undefined one is None instead of NaN."""
    return {k: v if math.isfinite(v) else None for k, v in row.items()}


def with_nan(row: Mapping[str, float | None]) -> dict[str, float]:
    """Returns the metrics that were given to `finite`, with NaN for None."""
    return {k: math.nan if v is None else v for k, v in row.items()}
