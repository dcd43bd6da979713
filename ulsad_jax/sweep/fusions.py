"""Other fusions of a trained member's two maps, scored without training again."""

from __future__ import annotations

import json
from pathlib import Path

from ulsad_jax.runs import evaluation, results
from ulsad_jax.runs.category import CategoryRun
from ulsad_jax.runtime import files

FUSIONS = "fusions.json"
LOCAL, GLOBAL, RAW_MEAN = "local", "global", "raw mean"


def write(run: CategoryRun, folder: Path, step: int, *, again: bool) -> None:
    """Writes the image metrics of each fusion: {"step": ..., fusion: {metric: value}}.

    An affine calibration of one map changes no order of its scores: local and global
    need none.

    Args:
        run: of the member's category.
        folder: of the category.
        step: of the checkpoint.
        again: whether what is there is of no use.
    """
    path = folder / FUSIONS
    if path.exists() and not again and json.loads(path.read_text())["step"] == step:
        return
    prediction, truth, loco = run.predict_uncalibrated(step)
    scores = {
        LOCAL: prediction.local_score,
        GLOBAL: prediction.global_score,
        RAW_MEAN: prediction.score,
    }
    found = {
        name: results.finite(
            evaluation.image_level(truth.labels, truth.types, score, loco=loco)
        )
        for name, score in scores.items()
        if len(truth.labels)
    }
    files.replace(path, json.dumps({"step": step, **found}, indent=2) + "\n")
