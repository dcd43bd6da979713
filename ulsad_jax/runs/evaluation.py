"""Checks the scores of a test set and computes curves and rates from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ulsad_jax.data.records import GOOD
from ulsad_jax.metrics import image as image_metrics
from ulsad_jax.metrics import stream as pixel_stream
from ulsad_jax.metrics.curves import thin
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring import thresholds as decisions
from ulsad_jax.scoring.prediction import Prediction
from ulsad_jax.scoring.split import Truth

if TYPE_CHECKING:
    from jaxtyping import Float


def check_finite(
    maps: Float[np.ndarray, "n h w"],
    scores: Mapping[str, Float[np.ndarray, " n"]],
    images: Sequence[Path],
) -> None:
    """Checks that all anomaly maps and scores are finite.

    Args:
        maps: anomaly maps, [n, h, w].
        scores: scores by name, [n].
        images: paths of the n images.

    Raises:
        UserError: a value is NaN or infinite; the message names the first such image.
    """
    bad = np.flatnonzero(~np.isfinite(maps).all((1, 2)))
    if bad.size:
        row, column = np.argwhere(~np.isfinite(maps[bad[0]]))[0]
        raise UserError(
            f"Expected finite anomaly maps, found NaN or infinite values in "
            f"{bad.size} of {len(maps)}, the first at row {row}, column {column} of "
            f"the map of {images[bad[0]]}. The networks diverged, or the trunk does "
            "not fit: train again, with a lower learning rate (ULSAD's is "
            "config.optimizer.learning_rate) or config.train.dtype float32."
        )
    for name, values in scores.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise UserError(
                f"Expected finite scores, found NaN or infinity in {bad.size} of "
                f"{len(values)} scores {name!r}, the first that of {images[bad[0]]}. "
                "Train again, or leave that part out of config.method."
            )


def pixel_curves(
    stream: pixel_stream.PixelStream,
) -> dict[str, dict[str, list[float]]]:
    """Returns curves to draw by name, {name: {"fpr": [...], "overlap": [...]}}.

    Undefined curves are left out.

    Args:
        stream: pixels of the test images. With saturation areas, the curves include
            sPRO of logical and of structural anomalies.
    """
    wanted = {
        "roc": (pixel_stream.DEFECTIVE, None),
        "pro": (pixel_stream.REGIONS, None),
    }
    if stream.has_saturation:
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
    """Returns the rates of true and false positives of both thresholds on a split.

    Pixels are counted at model resolution, over the images whose mask is known.
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
