"""Scores of a test set: maps, image scores, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from ulsad_jax.data.records import GOOD
from ulsad_jax.metrics import image as image_metrics
from ulsad_jax.metrics import pixel as pixel_metrics
from ulsad_jax.metrics import stream as pixel_stream
from ulsad_jax.metrics.curves import thin
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring import thresholds as decisions
from ulsad_jax.scoring.prediction import Prediction

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, UInt8


class Truth(NamedTuple):
    """What is known of a split's images.

    Attributes:
        labels: [n], 0 normal or 1 anomalous.
        types: n names.
        masks: [n, h, w] bool at model resolution.
        has_mask: [n]; False for an anomalous image without ground truth, or with
            an empty one.
        mask_lost: [n]; True where there are defective pixels on disk, none in `masks`.
        images: [n, h, w, 3] uint8 at model resolution.
    """

    labels: np.ndarray
    types: Sequence[str]
    masks: np.ndarray
    has_mask: np.ndarray
    mask_lost: np.ndarray
    images: np.ndarray


def predict_split(
    predict: Callable[[UInt8[Array, "b h w 3"]], Prediction],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    types: Sequence[str],
    image_size: tuple[int, int],
) -> tuple[Prediction, Truth]:
    """Predicts every image of a split, once, in its order.

    Args:
        predict: from images to a prediction.
        batches: see `pipeline.Examples.batches`.
        types: of every image of the split.
        image_size: (height, width) of the maps.
    """
    n = len(types)
    prediction = Prediction(
        anomaly_map=np.zeros((n, *image_size), np.float32),
        **{
            name: np.zeros(n, np.float32)
            for name in ("score", "local_score", "global_score", "normalized_score")
        },
        is_anomalous=np.zeros(n, bool),
        mask_area=np.zeros(n, np.int32),
    )
    truth = Truth(
        labels=np.zeros(n, np.int32),
        types=types,
        masks=np.zeros((n, *image_size), bool),
        has_mask=np.zeros(n, bool),
        mask_lost=np.zeros(n, bool),
        images=np.zeros((n, *image_size, 3), np.uint8),
    )
    for batch in batches:
        valid = batch["valid"]
        rows = batch["index"][valid]
        new = jax.device_get(predict(batch["image"]))
        jax.tree.map(
            lambda all_, b, v=valid, r=rows: _put(all_, r, b[v]), prediction, new
        )
        truth.labels[rows] = batch["label"][valid]
        truth.masks[rows] = batch["gt_mask"][valid]
        truth.has_mask[rows] = batch["has_mask"][valid]
        truth.mask_lost[rows] = batch["mask_lost"][valid]
        truth.images[rows] = batch["image"][valid]
    return prediction, truth


def check_finite(maps: Float[np.ndarray, "n h w"], images: Sequence[Path]) -> None:
    """Refuses maps that nothing can be measured on.

    Raises:
        UserError: names the first image whose map has a value that is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(maps).all((1, 2)))
    if bad.size:
        row, column = np.argwhere(~np.isfinite(maps[bad[0]]))[0]
        raise UserError(
            f"Expected finite anomaly maps, found NaN or infinite values in "
            f"{bad.size} of {len(maps)}, the first at row {row}, column {column} of "
            f"the map of {images[bad[0]]}. The networks diverged, or the trunk does "
            "not fit: train again, with a lower config.optimizer.learning_rate or "
            "config.train.dtype float32."
        )


def image_level(
    labels: Int[np.ndarray, " n"],
    types: Sequence[str],
    scores: Float[np.ndarray, " n"],
    *,
    loco: bool,
) -> dict[str, float]:
    """Image metrics: pooled, per type, and MVTec LOCO's headline.

    Args:
        labels: 0 normal or 1 anomalous.
        types: "good" or the type of the anomaly.
        scores: of the images.
        loco: whether to add 0.5 * (logical + structural).
    """
    f1, threshold = image_metrics.f1_max(labels, scores)
    metrics = {
        "image_auroc": image_metrics.auroc(labels, scores),
        "image_average_precision": image_metrics.average_precision(labels, scores),
        "image_f1_max": f1,
        "image_f1_max_threshold": threshold,
    }
    by_type = image_metrics.by_type(types, scores)
    if loco:
        metrics["image_auroc_mean_of_types"] = image_metrics.loco_headline(by_type)
    return metrics | {f"image_auroc/{name}": value for name, value in by_type.items()}


def pixel_level(
    masks: Bool[np.ndarray, "n h w"],
    has_mask: Bool[np.ndarray, " n"],
    maps: Float[np.ndarray, "n h w"],
) -> dict[str, float]:
    """Pixel metrics at model resolution over the images whose mask is known."""
    metrics = pixel_metrics.pixel_metrics(masks[has_mask], maps[has_mask])
    named = {
        name if name == "aupro" else f"pixel_{name}": value
        for name, value in metrics.items()
    }
    return named | {"pixel_images_left_out": int((~has_mask).sum())}


def stream_pixels(
    masks: Bool[np.ndarray, "n h w"],
    has_mask: Bool[np.ndarray, " n"],
    maps: Float[np.ndarray, "n h w"],
) -> pixel_stream.PixelStream:
    """The pixels of the images whose mask is known, at model resolution."""
    stream = pixel_stream.PixelStream()
    for i in np.flatnonzero(has_mask):
        stream.add(maps[i], masks[i][None])
    return stream


def pixel_curves(
    stream: pixel_stream.PixelStream, *, loco: bool
) -> dict[str, dict[str, list[float]]]:
    """Curves to draw: name -> {"fpr", "overlap"}, without those that are undefined.

    Args:
        stream: of pixels.
        loco: whether to add sPRO of logical and of structural anomalies.
    """
    wanted = {
        "roc": (pixel_stream.DEFECTIVE, None),
        "pro": (pixel_stream.REGIONS, None),
    }
    if loco:
        for kind in (image_metrics.LOGICAL, image_metrics.STRUCTURAL):
            wanted[f"spro/{kind}"] = (pixel_stream.CHANNELS, [GOOD, kind])
    curves = {}
    for name, (overlap, groups) in wanted.items():
        curve = stream.curve(overlap, groups)
        if curve is not None:
            columns = thin(curve)._asdict().items()
            curves[name] = {k: np.round(v, 5).tolist() for k, v in columns}
    return curves


def decision_level(
    prediction: Prediction, truth: Truth, thresholds: decisions.Thresholds
) -> dict[str, float]:
    """What the thresholds do on a split: rates of true and of false positives.

    Pixels are counted at model resolution over the images whose mask is known.
    """
    image_tpr, image_fpr = decisions.rates(truth.labels, prediction.is_anomalous)
    known = truth.has_mask
    pixel_tpr, pixel_fpr = decisions.rates(
        truth.masks[known], prediction.anomaly_map[known] > thresholds.pixel
    )
    return {
        "image_tpr": image_tpr,
        "image_fpr": image_fpr,
        "pixel_tpr": pixel_tpr,
        "pixel_fpr": pixel_fpr,
    }


def _put(target: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
    target[rows] = values
