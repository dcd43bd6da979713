"""Chooses the test images to draw and writes their pictures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ulsad_jax.report import figures
from ulsad_jax.runtime import files
from ulsad_jax.scoring.prediction import Prediction, Weights
from ulsad_jax.scoring.split import Truth

if TYPE_CHECKING:
    from jaxtyping import UInt8


def write(
    folder: Path,
    prediction: Prediction,
    truth: Truth,
    stems: Sequence[str],
    weights: Weights,
    *,
    limit: int,
) -> list[tuple[str, UInt8[np.ndarray, "h w 3"]]]:
    """Writes pictures of each type, and removes those of earlier evaluations.

    Args:
        folder: folder of the pictures.
        prediction: prediction of the test images.
        truth: labels, masks and pixels of the same images.
        stems: file names of the images, without suffix.
        weights: weights that hold the colour range and the pixel threshold.
        limit: number of pictures of each type; -1 for all.

    Returns:
        The name and one picture of each type, for TensorBoard.
    """
    calibration = weights.calibration
    shutil.rmtree(folder, ignore_errors=True)
    shown = []
    for kind in dict.fromkeys(truth.types):
        rows = [i for i, name in enumerate(truth.types) if name == kind]
        sign = -1 if truth.labels[rows[0]] == 0 else 1
        rows.sort(key=lambda i, s=sign: s * prediction.score[i])
        rows = choose(rows, limit)
        target = folder / files.safe_name(kind)
        target.mkdir(parents=True, exist_ok=True)
        for i in rows:
            drawn = figures.picture(
                truth.images[i],
                truth.masks[i] if truth.has_mask[i] else None,
                prediction.anomaly_map[i],
                low=calibration.display_low,
                high=calibration.display_high,
                threshold=weights.thresholds.pixel,
            )
            Image.fromarray(drawn).save(target / files.safe_name(stems[i], ".png"))
            if i == rows[0]:
                shown.append((f"test/{kind}", drawn))
    return shown


def choose(rows: list[int], limit: int) -> list[int]:
    """Returns at most `limit` rows: half are the first, half are spread over the rest.

    Args:
        rows: indices of images, the most wrongly scored first.
        limit: number of rows; negative for all.
    """
    if limit < 0 or limit >= len(rows):
        return rows
    worst = -(-limit // 2)
    spread = np.linspace(worst, len(rows) - 1, limit - worst).astype(int)
    return rows[:worst] + [rows[k] for k in spread]
