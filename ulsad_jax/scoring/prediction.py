"""Computes maps, scores and decisions of images, as one pure function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.scoring import calibration, thresholds
from ulsad_jax.scoring.fusion import image_score
from ulsad_jax.trunks import features
from ulsad_jax.trunks.sources import Batch

if TYPE_CHECKING:
    from jaxtyping import Array, UInt8

    from ulsad_jax.methods.base import Method
    from ulsad_jax.trunks.pyramid import FeaturePyramid


@flax.struct.dataclass
class Weights:
    """The arrays that turn an image into a score, as one tree.

    Attributes:
        trunk: variables of the feature pyramid; None for a method that takes images.
        statistics: statistics of the feature channels; None for a method that takes
            images.
        model: `State.model` of the method.
        calibration: calibration of the maps.
        thresholds: thresholds of scores and calibrated maps.
    """

    trunk: Mapping[str, Any] | None
    statistics: features.ChannelStatistics | None
    model: Any
    calibration: calibration.Calibration
    thresholds: thresholds.Thresholds


@flax.struct.dataclass
class Prediction:
    """The prediction for a batch, or for a whole split.

    Attributes:
        anomaly_map: [b, h, w] float32, the mean of `maps`.
        score: [b], the score of the anomaly map, or the fusion of `scores`.
        normalized_score: [b], see `thresholds.normalize`.
        is_anomalous: [b] bool, True if the score is above the image threshold.
        scores: {name: [b]}, the scores of each calibrated map, and the method's own.
        mask_area: [b] int32, number of pixels of the anomaly map above the pixel
            threshold.
        maps: {name: [b, h, w]} float32, calibrated; empty if they are not kept.
    """

    anomaly_map: jax.Array
    score: jax.Array
    normalized_score: jax.Array
    is_anomalous: jax.Array
    scores: dict[str, jax.Array]
    mask_area: jax.Array
    maps: dict[str, jax.Array]


@functools.lru_cache
def make_predict_step(
    pyramid: FeaturePyramid | None,
    method: Method,
    *,
    top_share: float = 0.0,
    keep_maps: bool = False,
) -> Callable[[Weights, UInt8[Array, "b h w 3"]], Prediction]:
    """Returns the jitted `predict(weights, image)`, from uint8 images to a prediction.

    Equal arguments give the same function, which is compiled once.

    Args:
        pyramid: network that computes features; None for a method that takes images.
        method: method that computes maps and scores.
        top_share: share of a map's pixels in its score, see `fusion.image_score`.
        keep_maps: True to return every calibrated map.
    """

    @jax.jit
    def predict(weights: Weights, image: UInt8[Array, "b h w 3"]) -> Prediction:
        given = None
        if pyramid is not None:
            given = features.apply(pyramid, weights.trunk, image, weights.statistics)
            image = features.resize_images(pyramid, image)
        batch = Batch(image, given, jnp.ones(image.shape[0], bool))
        maps = method.maps(weights.model, batch)
        calibrated = calibration.calibrate_maps(maps, weights.calibration)
        fused = calibration.fuse(maps, weights.calibration)
        scores = {n: image_score(m, top_share) for n, m in calibrated.items()}
        scores |= method.scores(weights.model, batch)
        fusion = weights.calibration.fusion
        score = fusion(scores) if fusion else image_score(fused, top_share)
        return Prediction(
            anomaly_map=fused,
            score=score,
            normalized_score=thresholds.normalize(score, weights.thresholds),
            is_anomalous=score > weights.thresholds.image,
            scores=scores,
            mask_area=(fused > weights.thresholds.pixel).sum((1, 2), dtype=np.int32),
            maps=calibrated if keep_maps else {},
        )

    return predict
