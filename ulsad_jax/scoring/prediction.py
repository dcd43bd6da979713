"""From images to maps, scores and decisions, as one pure function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import numpy as np

from ulsad_jax.methods.ulsad.networks import Ulsad
from ulsad_jax.scoring import calibration as scoring
from ulsad_jax.scoring import thresholds as decisions
from ulsad_jax.trunks.features import ChannelStatistics
from ulsad_jax.trunks.pyramid import FeaturePyramid

if TYPE_CHECKING:
    from jaxtyping import Array, UInt8


@flax.struct.dataclass
class Weights:
    """Everything that turns an image into a score, as one tree.

    Attributes:
        trunk: variables of the feature pyramid.
        statistics: of the feature channels.
        variables: of both networks.
        calibration: of the maps.
        thresholds: of scores and calibrated maps.
    """

    trunk: Mapping[str, Any]
    statistics: ChannelStatistics
    variables: Mapping[str, Any]
    calibration: scoring.Calibration
    thresholds: decisions.Thresholds


@flax.struct.dataclass
class Prediction:
    """What the system says of a batch, or of a whole split.

    Attributes:
        anomaly_map: [b, h, w] float32.
        score: [b], the maximum of the map.
        local_score: [b], the maximum of the calibrated local map alone.
        global_score: [b], the maximum of the calibrated global map alone.
        normalized_score: [b], see `decisions.normalize`.
        is_anomalous: [b] bool, whether the score is above the image threshold.
        mask_area: [b] int32, pixels of the map above the pixel threshold.
    """

    anomaly_map: jax.Array
    score: jax.Array
    local_score: jax.Array
    global_score: jax.Array
    normalized_score: jax.Array
    is_anomalous: jax.Array
    mask_area: jax.Array


@functools.lru_cache
def make_predict_step(
    pyramid: FeaturePyramid, model: Ulsad
) -> Callable[[Weights, UInt8[Array, "b h w 3"]], Prediction]:
    """Jits `predict(weights, image)`, from uint8 images to maps and decisions.

    Equal networks get the same function, which is compiled once.
    """

    @jax.jit
    def predict(weights: Weights, image: UInt8[Array, "b h w 3"]) -> Prediction:
        features = weights.statistics.standardize(pyramid.apply(weights.trunk, image))
        outputs = model.apply(weights.variables, features, image, train=False)
        maps = scoring.raw_maps(outputs, image.shape[1:3])
        calibrated = scoring.calibrate_maps(maps, weights.calibration)
        fused = scoring.fuse(maps, weights.calibration)
        score = scoring.image_score(fused)
        return Prediction(
            anomaly_map=fused,
            score=score,
            local_score=scoring.image_score(calibrated.local),
            global_score=scoring.image_score(calibrated.global_),
            normalized_score=decisions.normalize(score, weights.thresholds),
            is_anomalous=score > weights.thresholds.image,
            mask_area=(fused > weights.thresholds.pixel).sum((1, 2), dtype=np.int32),
        )

    return predict
