"""Image-level metrics: one label and one score an image.

A label is 0 (normal) or 1 (anomalous), a larger score means more anomalous, and equal
scores are one point of a curve. A metric that the labels leave undefined is NaN, with
an `UndefinedMetricWarning`; never 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn import metrics as sklearn_metrics

from ulsad_jax.metrics.curves import UndefinedMetricWarning as UndefinedMetricWarning
from ulsad_jax.metrics.curves import check_finite, find_tie_ends, warn_undefined

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num, Shaped

LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"  # MVTec LOCO's names


def auroc(labels: Num[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float:
    """The area under the ROC curve (scikit-learn's `roc_auc_score`).

    Args:
        labels: 0 or 1.
        scores: finite; larger means more anomalous.

    Returns:
        In [0, 1]; NaN unless both labels occur.

    Raises:
        ValueError: shapes that differ, another label, a score that is not finite.
    """
    labels, scores = _check(labels, scores)
    if is_undefined("AUROC", labels, unit="image"):
        return math.nan
    return float(sklearn_metrics.roc_auc_score(labels, scores))


def average_precision(
    labels: Num[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
) -> float:
    """Σ (R_k - R_{k-1}) P_k, a step sum (scikit-learn's `average_precision_score`).

    Args, returned range and errors are those of `auroc`.
    """
    labels, scores = _check(labels, scores)
    if is_undefined("Average precision", labels, unit="image"):
        return math.nan
    return float(sklearn_metrics.average_precision_score(labels, scores))


def f1_max(
    labels: Num[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
) -> tuple[float, float]:
    """The largest F1 over all thresholds, and its threshold.

    Args and errors are those of `auroc`.

    Returns:
        (F1 in [0, 1], t): `scores >= t` is called anomalous. t is one of the scores,
        the largest if several thresholds are best. Both are NaN unless both labels
        occur.
    """
    labels, scores = _check(labels, scores)
    if is_undefined("F1-max", labels, unit="image"):
        return math.nan, math.nan
    order = np.argsort(scores)[::-1]
    labels, scores = labels[order], scores[order]
    ends = find_tie_ends(scores)
    return find_best_f1(np.cumsum(labels)[ends], ends + 1, scores[ends])


def by_type(types: Sequence[str], scores: Float[np.ndarray, " n"]) -> dict[str, float]:
    """The AUROC of each type of anomaly: all normal images against that type's.

    Args:
        types: n names; images of the type "good" are normal, all others anomalous.
        scores: finite; larger means more anomalous.

    Returns:
        Type of anomaly -> AUROC, sorted by name; all NaN without normal images.

    Raises:
        ValueError: shapes that differ, a score that is not finite.
    """
    types = np.asarray(types, dtype=str)
    anomalous, scores = _check(types != "good", scores)
    names = [str(name) for name in np.unique(types[anomalous])]
    if names and is_undefined("AUROC by type", anomalous, unit="image"):
        return dict.fromkeys(names, math.nan)
    chosen = {name: ~anomalous | (types == name) for name in names}
    return {name: auroc(anomalous[c], scores[c]) for name, c in chosen.items()}


def loco_headline(aurocs: Mapping[str, float]) -> float:
    """MVTec LOCO's headline: the mean AUROC of logical and structural anomalies.

    Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised
    Anomaly Detection and Localization", IJCV 2022. The two count alike, however many
    images each has.

    Args:
        aurocs: what `by_type` returns for a category of MVTec LOCO.

    Returns:
        In [0, 1]; NaN if one of the two is NaN or missing.
    """
    missing = [name for name in (LOGICAL, STRUCTURAL) if name not in aurocs]
    if missing:
        warn_undefined(
            "The mean of logical and structural AUROC",
            f"{LOGICAL!r} and {STRUCTURAL!r}, found {sorted(aurocs)}",
            stacklevel=2,
        )
        return math.nan
    return 0.5 * (aurocs[LOGICAL] + aurocs[STRUCTURAL])


def is_undefined(metric: str, positive: Bool[np.ndarray, "..."], *, unit: str) -> bool:
    """Whether one of the two classes is empty; if so, warns at the caller's caller.

    Args:
        metric: what the warning calls undefined.
        positive: whether each image or pixel is anomalous.
        unit: "image" or "pixel".
    """
    count = int(np.count_nonzero(positive))
    if 0 < count < positive.size:
        return False
    warn_undefined(
        metric,
        f"anomalous and normal {unit}s, found {count} and {positive.size - count}",
        stacklevel=3,
    )
    return True


def find_best_f1(
    true_positives: Int[np.ndarray, " k"],
    predicted: Int[np.ndarray, " k"],
    thresholds: Num[np.ndarray, " k"],
) -> tuple[float, float]:
    """The largest F1 and the first threshold that reaches it.

    Args:
        true_positives: of each threshold; the last calls everything anomalous.
        predicted: how many each threshold calls anomalous.
        thresholds: descending.
    """
    # 2 TP / (2 TP + FP + FN). A quotient of integers: equal F1 are equal floats.
    f1 = 2 * true_positives / (predicted + true_positives[-1])
    best = np.argmax(f1)
    return float(f1[best]), float(thresholds[best])


def _check(
    labels: Shaped[np.ndarray, " n"], scores: Num[np.ndarray, " n"]
) -> tuple[Bool[np.ndarray, " n"], Num[np.ndarray, " n"]]:
    """Checks what the public functions are given."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"Expected one label and one score an image, found labels of shape "
            f"{labels.shape} and scores of shape {scores.shape}."
        )
    check_finite(scores)
    wrong = np.flatnonzero((labels != 0) & (labels != 1))
    if wrong.size:
        raise ValueError(
            f"Expected labels 0 (normal) or 1 (anomalous), found "
            f"{labels[wrong[0]].item()!r} at index {wrong[0]}."
        )
    return labels == 1, scores
