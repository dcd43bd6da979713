"""Computes image-level metrics from one label and one score per image.

A label is 0 (normal) or 1 (anomalous), a larger score means more anomalous, and equal
scores are one point of a curve. A metric that the labels leave undefined is NaN, with
an `UndefinedMetricWarning`; never 0 or 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn import metrics as sklearn_metrics

from ulsad_jax.metrics.base import (
    GOOD,
    IMAGE,
    LOGICAL,
    SCORE_AUROC,
    STRUCTURAL,
    Images,
    Metric,
)
from ulsad_jax.metrics.curves import UndefinedMetricWarning as UndefinedMetricWarning
from ulsad_jax.metrics.curves import check_finite, find_tie_ends, warn_undefined

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num, Shaped


def auroc(labels: Num[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float:
    """Returns the area under the ROC curve (scikit-learn's `roc_auc_score`).

    Args:
        labels: [n], 0 (normal) or 1 (anomalous).
        scores: [n], finite; larger means more anomalous.

    Returns:
        The area in [0, 1]; NaN unless both labels occur.

    Raises:
        ValueError: the shapes differ, a label is neither 0 nor 1, or a score is not
            finite.
    """
    labels, scores = _check(labels, scores)
    if is_undefined("AUROC", labels, unit="image"):
        return math.nan
    return float(sklearn_metrics.roc_auc_score(labels, scores))


def average_precision(
    labels: Num[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
) -> float:
    """Returns the average precision (scikit-learn's `average_precision_score`).

    It is the step sum Σ (R_k - R_{k-1}) P_k, without interpolation. Arguments, range
    and errors are those of `auroc`.
    """
    labels, scores = _check(labels, scores)
    if is_undefined("Average precision", labels, unit="image"):
        return math.nan
    return float(sklearn_metrics.average_precision_score(labels, scores))


def f1_max(
    labels: Num[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
) -> tuple[float, float]:
    """Returns the largest F1 over all thresholds, and its threshold.

    Arguments and errors are those of `auroc`.

    Returns:
        (F1 in [0, 1], t): images with `scores >= t` are called anomalous. t is one of
        the scores, the largest if several thresholds are best. Both are NaN unless both
        labels occur.
    """
    labels, scores = _check(labels, scores)
    if is_undefined("F1-max", labels, unit="image"):
        return math.nan, math.nan
    order = np.argsort(scores)[::-1]
    labels, scores = labels[order], scores[order]
    ends = find_tie_ends(scores)
    return find_best_f1(np.cumsum(labels)[ends], ends + 1, scores[ends])


def by_type(types: Sequence[str], scores: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Returns the AUROC of each type of anomaly against all normal images.

    Args:
        types: n names; images of the type "good" are normal, all others anomalous.
        scores: [n], finite; larger means more anomalous.

    Returns:
        AUROC by type of anomaly, sorted by name; all NaN without normal images.

    Raises:
        ValueError: the shapes differ, or a score is not finite.
    """
    types = np.asarray(types, dtype=str)
    anomalous, scores = _check(types != GOOD, scores)
    names = [str(name) for name in np.unique(types[anomalous])]
    if names and is_undefined("AUROC by type", anomalous, unit="image"):
        return dict.fromkeys(names, math.nan)
    chosen = {name: ~anomalous | (types == name) for name in names}
    return {name: auroc(anomalous[c], scores[c]) for name, c in chosen.items()}


def loco_headline(aurocs: Mapping[str, float]) -> float:
    """Returns MVTec LOCO's main result: the mean of the logical and structural AUROC.

    Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised
    Anomaly Detection and Localization", IJCV 2022. Both have the same weight, however
    many images each has.

    Args:
        aurocs: result of `by_type` for a category of MVTec LOCO.

    Returns:
        The mean in [0, 1]; NaN if one of the two is NaN or missing.
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
    """Returns whether one of the two classes is empty, and warns if it is.

    The warning names the caller of the caller.

    Args:
        metric: name of the metric, for the warning.
        positive: boolean array, True for anomalous images or pixels.
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
    """Returns the largest F1 and the first threshold that reaches it.

    Args:
        true_positives: number of true positives at each threshold, [k]; the last
            threshold calls everything anomalous.
        predicted: number of images or pixels that each threshold calls anomalous, [k].
        thresholds: thresholds [k], descending.
    """
    # 2 TP / (2 TP + FP + FN). A quotient of integers: equal F1 are equal floats.
    f1 = 2 * true_positives / (predicted + true_positives[-1])
    best = np.argmax(f1)
    return float(f1[best]), float(thresholds[best])


def _check(
    labels: Shaped[np.ndarray, " n"], scores: Num[np.ndarray, " n"]
) -> tuple[Bool[np.ndarray, " n"], Num[np.ndarray, " n"]]:
    """Checks the arguments of the public functions, and returns labels as booleans."""
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


def by_score(
    labels: Num[np.ndarray, " n"],
    types: Sequence[str],
    scores: Mapping[str, Float[np.ndarray, " n"]],
) -> dict[str, float]:
    """Returns the AUROC of every score, {"score_auroc/<score>[/<type>]": value}.

    Args:
        labels: [n], 0 normal or 1 anomalous.
        types: n names, "good" or the type of the anomaly.
        scores: scores by name, [n]; a single one is that of the whole, and left out.
    """
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)  # `_auroc` warned
        for name, values in scores.items() if len(scores) > 1 else ():
            key = f"{SCORE_AUROC}/{name}"
            found[key] = auroc(labels, values)
            for kind, value in by_type(types, values).items():
                found[f"{key}/{kind}"] = value
    return found


def _auroc(images: Images) -> dict[str, float]:
    pooled = auroc(images.labels, images.scores)
    return {"": pooled, **by_type(images.types, images.scores)}


def _mean_of_types(images: Images) -> float | None:
    if not images.has_saturation:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)  # `_auroc` warned
        aurocs = by_type(images.types, images.scores)
    return loco_headline(aurocs)


METRICS = {
    "image_auroc": Metric("image AUROC", IMAGE, _auroc),
    "image_auroc_mean_of_types": Metric("mean of types", IMAGE, _mean_of_types),
    "image_average_precision": Metric(
        "image AP",
        IMAGE,
        lambda images: average_precision(images.labels, images.scores),
    ),
    "image_f1_max": Metric(
        "image F1", IMAGE, lambda images: f1_max(images.labels, images.scores)[0]
    ),
    "image_f1_max_threshold": Metric(
        "", IMAGE, lambda images: f1_max(images.labels, images.scores)[1]
    ),
}
