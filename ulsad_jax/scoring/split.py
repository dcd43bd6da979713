"""Predicts a whole split, and collects the ground truth of its images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from ulsad_jax.data.resize import resize_bilinear
from ulsad_jax.scoring.prediction import Prediction

if TYPE_CHECKING:
    from jaxtyping import UInt8


class Truth(NamedTuple):
    """The images of a split and their ground truth.

    Attributes:
        labels: [n] int32, 0 normal or 1 anomalous.
        types: n names.
        masks: [n, h, w] bool at model resolution.
        has_mask: [n] bool; False for an anomalous image without ground truth, or with
            an empty one.
        mask_lost: [n] bool; True if there are defective pixels on disk but none in
            `masks`.
        images: [n, h, w, 3] uint8 at model resolution.
    """

    labels: np.ndarray
    types: Sequence[str]
    masks: np.ndarray
    has_mask: np.ndarray
    mask_lost: np.ndarray
    images: np.ndarray


def predict_split(
    predict: Callable[[UInt8[np.ndarray, "b h w 3"]], Prediction],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    shapes: Prediction,
    types: Sequence[str],
) -> tuple[Prediction, Truth]:
    """Predicts every image of a split once, and returns them in the split's order.

    Args:
        predict: function from images to a prediction.
        batches: batches of the split; see `batches.Examples.batches`.
        shapes: shapes and types of the prediction for a batch.
        types: type of every image of the split.
    """
    n = len(types)
    prediction = jax.tree.map(lambda x: np.zeros((n, *x.shape[1:]), x.dtype), shapes)
    image_size = prediction.anomaly_map.shape[1:]
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
        for all_, own in zip(*map(jax.tree.leaves, (prediction, new)), strict=True):
            all_[rows] = own[valid]
        truth.labels[rows] = batch["label"][valid]
        truth.masks[rows] = batch["gt_mask"][valid]
        truth.has_mask[rows] = batch["has_mask"][valid]
        truth.mask_lost[rows] = batch["mask_lost"][valid]
        for row, image in zip(rows, batch["image"][valid], strict=True):
            truth.images[row] = resize_bilinear(image, image_size)
    return prediction, truth
