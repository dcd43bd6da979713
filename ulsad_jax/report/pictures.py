"""Pictures of test images: which ones, and their files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ulsad_jax.report import figures
from ulsad_jax.runs import evaluation, results
from ulsad_jax.scoring import prediction as inference

if TYPE_CHECKING:
    from jaxtyping import UInt8


def write(
    folder: Path,
    prediction: inference.Prediction,
    truth: evaluation.Truth,
    stems: Sequence[str],
    weights: inference.Weights,
    *,
    limit: int,
) -> list[tuple[str, UInt8[np.ndarray, "h w 3"]]]:
    """Writes pictures of each type in place of what was there.

    Args:
        folder: of the pictures.
        prediction: of the test images.
        truth: of the same.
        stems: of their files.
        weights: have the range of colours and the thresholds.
        limit: pictures of each type; -1 for all.

    Returns:
        One picture a type and its name, for TensorBoard.
    """
    calibration = weights.calibration
    shutil.rmtree(folder, ignore_errors=True)
    shown = []
    for kind in dict.fromkeys(truth.types):
        rows = [i for i, name in enumerate(truth.types) if name == kind]
        sign = -1 if truth.labels[rows[0]] == 0 else 1
        rows.sort(key=lambda i, s=sign: s * prediction.score[i])
        rows = choose(rows, limit)
        target = folder / results.file_name(kind)
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
            Image.fromarray(drawn).save(target / results.file_name(stems[i], ".png"))
            if i == rows[0]:
                shown.append((f"test/{kind}", drawn))
    return shown


def choose(rows: list[int], limit: int) -> list[int]:
    """Of rows, the most wrongly scored first: half such ones, the others spread."""
    if limit < 0 or limit >= len(rows):
        return rows
    worst = -(-limit // 2)
    spread = np.linspace(worst, len(rows) - 1, limit - worst).astype(int)
    return rows[:worst] + [rows[k] for k in spread]
